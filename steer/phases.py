"""Phases: when something happens in a sequence, decided causally, token by token (DESIGN §2).

P >= 1 is the prompt's length and t counts real tokens (padding is skipped). A *mark* is a tuple of token ids; an
*event* is the last token of an opening or closing mark that lies wholly at or after `marks_from`; of two marks that end
together the longer wins. The state after reading token t is

    PROMPT    t < P - 1
    OPENING   t >= P - 1, no event so far
    THINKING  t >= P - 1, the last opening is later than the last closing
    ANSWER    t >= P - 1, the last closing is later than the last opening

`advance` is the one function behind batches under `generate`, whole traces and chunks of either. It is pure: the state
it takes is not changed, and any split of a sequence into chunks gives the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steer.errors import SteerError
from steer.marks import Marks

__all__ = [
    "MARKED",
    "PHASES",
    "Event",
    "Marks",
    "PhaseState",
    "State",
    "advance",
    "begin",
    "check_phase",
    "find_events",
    "phase_mask",
    "states_of",
]

PHASES = ("all", "prompt", "opening", "generated", "thinking", "answer")
MARKED = ("opening", "thinking", "answer")
NONE, OPENS, CLOSES = 0, 1, 2


class State(IntEnum):
    """What a position belongs to; PADDING is no token at all."""

    PADDING = -1
    PROMPT = 0
    OPENING = 1
    THINKING = 2
    ANSWER = 3


@dataclass(frozen=True)
class Event:
    """A mark that counts: tokens [start, end] of a sequence, both ends included."""

    opens: bool
    start: int
    end: int


@dataclass(frozen=True)
class PhaseState:
    """What must be remembered of each row between two chunks.

    Attributes:
        prompt_length, marks_from: as in `begin`.
        count: real tokens read so far.
        last_opening, last_closing: index of the last token of the last such mark; -1 for none.
        thought_start: first token of the opening mark that began the thought now running; -1 outside a thought.
        tail: the last (longest mark - 1) real tokens; -1 before the first.
    """

    prompt_length: Int[Tensor, " batch"]
    marks_from: Int[Tensor, " batch"]
    count: Int[Tensor, " batch"]
    last_opening: Int[Tensor, " batch"]
    last_closing: Int[Tensor, " batch"]
    thought_start: Int[Tensor, " batch"]
    tail: Int[Tensor, "batch tail"]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def select(self, rows: Int[Tensor, " kept"]) -> PhaseState:
        """Keep these rows, in this order; an index may be repeated."""
        return PhaseState(**{name: value[rows.to(value.device)] for name, value in self._tensors().items()})

    def join(self, other: PhaseState) -> PhaseState:
        """Put the rows of `other` behind these."""
        return PhaseState(
            **{
                name: torch.cat([value, getattr(other, name).to(value.device)])
                for name, value in self._tensors().items()
            }
        )

    def to(self, device: torch.device) -> PhaseState:
        """The same rows on another device."""
        return PhaseState(**{name: value.to(device) for name, value in self._tensors().items()})

    def current(self) -> Int[Tensor, " batch"]:
        """State of the last token read; PADDING for a row that has read none."""
        states = _states(self.count - 1, self.last_opening, self.last_closing, self.prompt_length)
        return torch.where(self.count > 0, states, torch.full_like(states, State.PADDING))


def begin(
    marks: Marks, prompt_lengths: Sequence[int], marks_from: Sequence[int], device: torch.device | str | None = None
) -> PhaseState:
    """The state of rows that have read nothing.

    Args:
        marks: the tokenizer's marks.
        prompt_lengths: tokens in each row's prompt, at least 1.
        marks_from: per row the index of the first token at which a mark may begin: the start of the generation prompt
            for chat messages, `Marks.raw_text_start` for raw text.
        device: where the rows live.

    Raises:
        ValueError: an empty prompt, a negative start, or unequal numbers of rows.
    """
    if len(prompt_lengths) != len(marks_from):
        raise ValueError(f"{len(prompt_lengths)} prompt lengths but {len(marks_from)} starts of marks")
    if any(length < 1 for length in prompt_lengths) or any(start < 0 for start in marks_from):
        raise ValueError(f"prompt lengths {list(prompt_lengths)} must be >= 1 and starts {list(marks_from)} >= 0")
    rows = len(prompt_lengths)

    def whole(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    none = whole([-1] * rows)
    tail = torch.full((rows, max(marks.longest - 1, 0)), -1, dtype=torch.long, device=device)
    return PhaseState(whole(prompt_lengths), whole(marks_from), whole([0] * rows), none, none, none, tail)


def advance(
    state: PhaseState, marks: Marks, token_ids: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"]
) -> tuple[PhaseState, Int[Tensor, "batch token"]]:
    """Read a chunk: the new state, and the `State` after every one of its tokens.

    Args:
        state: what the rows remember of the tokens before.
        marks: the marks `state` was begun with.
        token_ids: the chunk; what stands at padded places does not matter.
        real: where the chunk has a token; padding may be left, right or in between.
    """
    width = token_ids.shape[1]
    if width == 1:
        packed, read = token_ids, real.sum(1)
    else:  # Real tokens to the left, in order.
        packed = token_ids.gather(1, torch.argsort((~real).to(torch.uint8), dim=1, stable=True))
        read = real.sum(1)
    column = torch.arange(width, device=token_ids.device)
    there = column < read[:, None]
    index = state.count[:, None] + column
    kind, length = _match(state.tail, marks, packed, index, state.marks_from, there)
    opening = torch.where(kind == OPENS, index, -1).cummax(1).values.maximum(state.last_opening[:, None])
    closing = torch.where(kind == CLOSES, index, -1).cummax(1).values.maximum(state.last_closing[:, None])
    states = _states(index, opening, closing, state.prompt_length[:, None])
    place = (real.cumsum(1) - 1).clamp(min=0)
    spread = torch.where(real, states.gather(1, place), torch.full_like(states, State.PADDING))
    keep = torch.arange(state.tail.shape[1], device=token_ids.device) + read[:, None]
    after = PhaseState(
        prompt_length=state.prompt_length,
        marks_from=state.marks_from,
        count=state.count + read,
        last_opening=opening[:, -1],
        last_closing=closing[:, -1],
        thought_start=_thought_start(state, kind, index - length + 1, index, closing[:, -1]),
        tail=torch.cat([state.tail, packed], 1).gather(1, keep),
    )
    return after, spread


def _match(
    tail: Tensor, marks: Marks, packed: Tensor, index: Tensor, marks_from: Tensor, there: Tensor
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Per token: which kind of mark ends there (0 none), and that mark's length."""
    kind = torch.zeros_like(packed)
    length = torch.zeros_like(packed)
    line = torch.cat([tail, packed], 1)
    behind = tail.shape[1]
    for mark, which in marks.by_length(OPENS, CLOSES):  # A longer mark overwrites a shorter one.
        size = len(mark)
        ends = there & (index - size + 1 >= marks_from[:, None])
        for back, token in enumerate(reversed(mark)):
            ends = ends & (line[:, behind - back : line.shape[1] - back] == token)
        kind = torch.where(ends, which, kind)
        length = torch.where(ends, size, length)
    return kind, length


def _states(index: Tensor, opening: Tensor, closing: Tensor, prompt_length: Tensor) -> Tensor:
    states = torch.where(opening > closing, int(State.THINKING), int(State.ANSWER))
    states = torch.where(opening == closing, int(State.OPENING), states)  # Equal only where both are -1.
    return torch.where(index < prompt_length - 1, int(State.PROMPT), states)


def _thought_start(state: PhaseState, kind: Tensor, start: Tensor, index: Tensor, last_closing: Tensor) -> Tensor:
    """The first opening after the last closing began the thought; an opening inside a thought does not restart it."""
    later = (kind == OPENS) & (index > last_closing[:, None])
    first = later.to(torch.uint8).argmax(1, keepdim=True)
    fresh = torch.where(later.any(1), start.gather(1, first)[:, 0], -1)
    return torch.where((state.thought_start >= 0) & (last_closing == state.last_closing), state.thought_start, fresh)


def states_of(token_ids: Sequence[int], prompt_length: int, marks: Marks, marks_from: int = 0) -> list[State]:
    """The states of a finished sequence, by the same function that follows a running batch."""
    if not token_ids:
        return []
    ids = torch.tensor([list(token_ids)], dtype=torch.long)
    _, states = advance(begin(marks, [prompt_length], [marks_from]), marks, ids, torch.ones_like(ids, dtype=torch.bool))
    return [State(value) for value in states[0].tolist()]


def find_events(token_ids: Sequence[int], marks: Marks, marks_from: int = 0) -> list[Event]:
    """All marks of a finished sequence that count, in order, found by the matcher behind `advance`."""
    if not token_ids or not marks.exist:
        return []
    ids = torch.tensor([list(token_ids)], dtype=torch.long)
    state = begin(marks, [1], [marks_from])
    index = torch.arange(ids.shape[1])[None]
    kind, length = (
        value[0].tolist()
        for value in _match(state.tail, marks, ids, index, state.marks_from, torch.ones_like(ids, dtype=torch.bool))
    )
    return [
        Event(which == OPENS, end - size + 1, end)
        for end, (which, size) in enumerate(zip(kind, length, strict=True))
        if which != NONE
    ]


def phase_mask(states: Int[Tensor, "batch token"], phase: str) -> Bool[Tensor, "batch token"]:
    """Where a phase holds; padding is in no phase.

    Raises:
        SteerError: there is no such phase.
    """
    check_phase(phase, None)
    if phase == "all":
        return states != State.PADDING
    if phase == "generated":
        return states >= State.OPENING
    return states == State[phase.upper()]


def check_phase(phase: Any, marks: Marks | None) -> None:
    """Refuse a phase that does not exist, at all or (with `marks`) for this tokenizer.

    Raises:
        SteerError: an unknown phase, or one that needs marks where the tokenizer has none.
    """
    if phase not in PHASES:
        raise SteerError(f"there is no phase {phase!r}", f"one of {', '.join(PHASES)}")
    if marks is not None and not marks.exist and phase in MARKED:
        raise SteerError(
            f"phase {phase!r} needs marks around the thinking, and this model's tokenizer has none",
            "prompt, generated or all",
            "Use one of these, or give the marks that the model writes with steer.phases.Marks",
        )
