"""Marks: the token sequences that open and close a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import SteerError

Ids = tuple[int, ...]

# Pairs that reasoning models write as one token each; a pair counts where both are in the vocabulary.
PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
# The harmony format spells its channels with several tokens.
HARMONY = ("<|channel|>", "<|message|>", "analysis", "final")


@dataclass(frozen=True)
class Marks:
    """The opening and closing marks of a tokenizer; `Marks()` for a model that has none.

    Attributes:
        opening, closing: tuples of token ids, each of one or more ids; either both sides have marks or none has.
        turn_start: ids with which a reply's turn starts; in a raw text prompt only marks after its last occurrence
            count. None: all marks of a raw text prompt count.

    Raises:
        SteerError: an empty mark, a mark that both opens and closes, or marks on one side only.
    """

    opening: tuple[Ids, ...] = ()
    closing: tuple[Ids, ...] = ()
    turn_start: Ids | None = None

    def __post_init__(self) -> None:
        for name in ("opening", "closing"):
            object.__setattr__(self, name, tuple(tuple(int(token) for token in mark) for mark in getattr(self, name)))
        if self.turn_start is not None:
            object.__setattr__(self, "turn_start", tuple(int(token) for token in self.turn_start))
        sequences = (*self.opening, *self.closing, *(() if self.turn_start is None else (self.turn_start,)))
        if any(not mark or min(mark) < 0 for mark in sequences):
            raise SteerError(f"a mark is empty or has a negative token id in {self}", "one or more token ids per mark")
        both = sorted(set(self.opening) & set(self.closing))
        if both:
            raise SteerError(
                f"the token ids {list(both[0])} both open and close a thought", "different marks for the two"
            )
        if bool(self.opening) != bool(self.closing):
            raise SteerError(
                "marks are given for one side of the thinking only",
                "at least one opening and one closing mark, or none at all",
            )

    @property
    def exist(self) -> bool:
        """Whether thinking can be told from the rest."""
        return bool(self.opening)

    @property
    def longest(self) -> int:
        """Tokens in the longest mark; 0 without marks."""
        return max((len(mark) for mark in (*self.opening, *self.closing)), default=0)

    def by_length(self, opens: int, closes: int) -> list[tuple[Ids, int]]:
        """Every mark with its kind, shortest first."""
        kinds = [(mark, opens) for mark in self.opening] + [(mark, closes) for mark in self.closing]
        return sorted(kinds, key=lambda pair: len(pair[0]))

    def raw_text_start(self, prompt_token_ids: Sequence[int]) -> int:
        """Where marks begin to count in a raw text prompt: after its last `turn_start`, else at 0."""
        ids, turn = tuple(prompt_token_ids), self.turn_start
        if turn is None:
            return 0
        ends = [end for end in range(len(turn), len(ids) + 1) if ids[end - len(turn) : end] == turn]
        return ends[-1] if ends else 0

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Marks:
        """The marks that this Hugging Face tokenizer knows as tokens; `Marks()` if it knows none."""
        known: Mapping[str, int] = tokenizer.get_vocab()
        pairs = [
            (known[opening], known[closing]) for opening, closing in PAIRS if opening in known and closing in known
        ]
        marks_open: list[Ids] = [(opening,) for opening, _ in pairs]
        marks_close: list[Ids] = [(closing,) for _, closing in pairs]
        if all(name in known for name in HARMONY):
            channel, message, analysis, final = (known[name] for name in HARMONY)
            marks_open.append((channel, analysis, message))
            marks_close.append((channel, final, message))
        return cls(tuple(marks_open), tuple(marks_close))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, as they stand in run.yaml."""
        turn = None if self.turn_start is None else list(self.turn_start)
        return {
            "opening": [list(mark) for mark in self.opening],
            "closing": [list(mark) for mark in self.closing],
            "turn_start": turn,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Marks:
        """The inverse of `to_dict`.

        Raises:
            SteerError: an unknown key.
        """
        unknown = sorted(set(plain) - {"opening", "closing", "turn_start"})
        if unknown:
            raise SteerError(f"marks have the unknown key {unknown[0]!r}", "opening, closing, turn_start")
        turn = plain.get("turn_start")
        return cls(
            tuple(map(tuple, plain.get("opening", ()))),
            tuple(map(tuple, plain.get("closing", ()))),
            None if turn is None else tuple(turn),
        )
