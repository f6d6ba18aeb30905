"""Phases on the device: `steer.phases.advance` over the tokens of a step, for the requests whose steering needs marks.

Under asynchronous scheduling the host does not know the last token yet, so nothing here waits for the device. What must be
remembered of a request is one row of a `PhaseState`; a request that is new, resumed or found elsewhere than expected gets
its row from its known tokens, on the host, by the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from steer.backends.vllm.tables import moved
from steer.marks import Marks
from steer.phases import PhaseState, advance, begin


class Tracker:
    """Phases of up to `rows` requests.

    Args:
        marks: of the tokenizer.
        rows: how many requests may run at once; a request that waits preempted keeps its row, so there may be more.
        device: of the tokens.
    """

    def __init__(self, marks: Marks, rows: int, device: torch.device) -> None:
        self.marks, self.device = marks, device
        # Written in place below, so no two fields may share a tensor.
        self.state = _apart(begin(marks, [1] * rows, [0] * rows, device))

    def grow(self) -> range:
        """Make as many rows again, and return the new ones."""
        rows = len(self.state.count)
        self.state = self.state.join(_apart(begin(self.marks, [1] * rows, [0] * rows, self.device)))
        return range(rows, 2 * rows)

    def enter(self, row: int, prompt_length: int, marks_from: int, read: Sequence[int]) -> None:
        """Let a request begin in a row, with the tokens that are computed already."""
        state = begin(self.marks, [prompt_length], [marks_from])
        if read:
            ids = torch.tensor([list(read)], dtype=torch.long)
            state, _ = advance(state, self.marks, ids, torch.ones_like(ids, dtype=torch.bool))
        there = PhaseState(
            **{name: moved(getattr(state, name), self.device) for name in PhaseState.__dataclass_fields__}
        )
        self._store(moved(torch.tensor([row]), self.device), there)

    def read(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], token_ids: Int[Tensor, " token"]
    ) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"]]:
        """Read a step's tokens.

        Args:
            rows: of the requests.
            starts, counts: where each one's tokens lie in the step, and how many.
            token_ids: of the step, on the device.

        Returns:
            Indices into the step, and the `steer.phases.State` there.
        """
        one = [index for index, count in enumerate(counts) if count == 1]
        more = [index for index, count in enumerate(counts) if count > 1]
        found = [
            self._read([rows[i] for i in part], [starts[i] for i in part], [counts[i] for i in part], token_ids)
            for part in (one, more)
            if part
        ]
        return torch.cat([index for index, _ in found]), torch.cat([states for _, states in found])

    def _read(self, rows: list[int], starts: list[int], counts: list[int], token_ids: Tensor) -> tuple[Tensor, Tensor]:
        place, start, count = moved(torch.tensor([rows, starts, counts]), self.device).unbind()
        column = torch.arange(max(counts), device=self.device)
        real = column < count[:, None]
        index = torch.where(real, start[:, None] + column, start[:, None])
        state, states = advance(self.state.select(place), self.marks, token_ids[index].long(), real)
        self._store(place, state)
        if max(counts) == 1:
            return index[:, 0], states[:, 0]
        # The real ones by their numbers, which the host knows: a mask would have to be counted on the device first.
        where = [np.arange(count) + row * max(counts) for row, count in enumerate(counts)]
        there = moved(torch.from_numpy(np.concatenate(where)), self.device)
        return index.flatten()[there], states.flatten()[there]

    def _store(self, rows: Tensor, state: PhaseState) -> None:
        for name in PhaseState.__dataclass_fields__:
            getattr(self.state, name)[rows] = getattr(state, name)


def _apart(state: PhaseState) -> PhaseState:
    return PhaseState(**{name: getattr(state, name).clone() for name in PhaseState.__dataclass_fields__})
