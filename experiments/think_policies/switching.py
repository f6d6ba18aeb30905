"""The thought-switching penalty TIP (arXiv 2501.18585, §4): words that begin another thought are made less likely for a while.

    z'_v = z_v - alpha   for v a switch token and t < start + steps, else z_v

with z the logits at step t and `start` the place where the current thought began: the opening mark, or the last switch token.
So for the first `steps` tokens of a thought the model is held to it. The paper takes alpha = 3 and steps = 600 (its beta).

A switch token is one token that writes a whole word, as it is and capitalised, with and without a space before it. A word
that the tokenizer writes with several tokens is refused: its first piece begins other words, too. "Thought" here is what
lies between two switches. Without marks around the thinking the whole reply is looked at; a switch in a prompt that has
opened the thought already is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.marks import Marks
from steer.phases import State
from steer.policy import Decision, PolicyRows
from steer.spans import SPACES

ALPHA, STEPS, WORDS = 3.0, 600, ("alternatively",)


@dataclass(frozen=True)
class SwitchPenalty:
    """Subtract `alpha` from the logits of switch tokens in the first `steps` tokens of a thought.

    Attributes:
        alpha: in logits; above 0.
        steps: how long after a thought began; at least 1.
        switches: token ids.
        words: that they write, for the reader.
        marked: whether only thinking between marks counts; else the whole reply.

    Raises:
        SteerError: a number out of range, or no switch token.
    """

    alpha: float
    steps: int
    switches: tuple[int, ...] = field(repr=False)
    words: tuple[str, ...] = WORDS
    marked: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0) or self.steps < 1:
            raise SteerError(
                f"the penalty on switching is {self.alpha:g} for {self.steps} tokens",
                "a finite number above 0 and 1 token or more",
                f"The paper takes tip:{ALPHA:g}:{STEPS}",
            )
        if not self.switches:
            raise SteerError("a penalty on switching has no token to make less likely", "at least one")

    @classmethod
    def of(
        cls,
        marks: Marks,
        tokenizer: Any,
        alpha: float = ALPHA,
        steps: int = STEPS,
        words: Sequence[str] = WORDS,
    ) -> SwitchPenalty:
        """The penalty for a model.

        Args:
            marks: the model's.
            tokenizer: writes the words.
            alpha: the penalty.
            steps: how long it lasts.
            words: that begin another thought.

        Raises:
            SteerError: a word that the tokenizer does not write with one token.
        """
        found = [token for word in words for token in switch_tokens(word, tokenizer)]
        return cls(alpha, steps, tuple(sorted(set(found))), tuple(words), marks.exist)

    @property
    def name(self) -> str:
        """`tip:ALPHA:STEPS`, with the words if they are not those of the paper."""
        plain = f"tip:{self.alpha:.12g}:{self.steps}"
        return plain if self.words == WORDS else f"{plain}:{','.join(self.words)}"

    def __call__(self, rows: PolicyRows, logits: Float[Tensor, "batch vocab"]) -> Decision:
        """Make switch tokens less likely in every row whose current thought is younger than `steps` tokens."""
        inside = rows.states == (State.THINKING if self.marked else State.OPENING)
        age = rows.thinking if self.marked else rows.generated
        last = [] if self.steps == 1 else [reply[1 - self.steps :] for reply in rows.replies]
        again = [not set(self.switches).isdisjoint(reply) for reply in last] or [False] * len(rows.replies)
        held = inside & ((age < self.steps) | torch.tensor(again, device=age.device))
        added = torch.zeros_like(logits)
        tokens = torch.tensor(self.switches, device=logits.device)
        added[:, tokens] = -self.alpha * held.to(logits)[:, None]
        return Decision(added=added)


def switch_tokens(word: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that each write a whole word, as it is and capitalised.

    Raises:
        SteerError: there is none.
    """
    found = spellings(word, tokenizer)
    if not found:
        raise SteerError(
            f"this model's tokenizer does not write {word!r} as one token",
            "words of one token",
            "Name others (tip:3:600:WORD,WORD), or use min:N, which needs none",
        )
    return found


def spellings(word: str, tokenizer: Any) -> tuple[int, ...]:
    """Return what `switch_tokens` does, and nothing where there is no such token."""
    bare, known = word.strip(), tokenizer.get_vocab()
    written = [space + text for text in dict.fromkeys((bare, bare.capitalize())) for space in SPACES] if bare else []
    return tuple(sorted({int(known[text]) for text in written if text in known}))
