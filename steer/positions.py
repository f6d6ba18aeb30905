"""Positions: who is where in a running batch.

Generation owns one such value per batch; a pre-hook on the backbone lets it read every chunk before any layer runs, so
that hooks know the phase of each position, and rows are dropped and added as sequences leave and enter the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from steer.marks import Marks
from steer.phases import PhaseState, advance, begin


class Positions:
    """Phases of the rows of a batch.

    Args:
        marks: the tokenizer's marks.
        prompt_lengths: tokens in each row's prompt, at least 1.
        marks_from: per row the first token at which a mark may begin; None: 0 everywhere (raw text).
        device: where the rows live; they follow the tokens that are observed.

    Attributes:
        state: what is remembered of each row.
        states: `State` values of the running or last forward, (batch, token), PADDING at padding; None before the first.
    """

    def __init__(
        self,
        marks: Marks,
        prompt_lengths: Sequence[int],
        marks_from: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.marks = marks
        self.state: PhaseState = begin(
            marks, prompt_lengths, [0] * len(prompt_lengths) if marks_from is None else marks_from, device
        )
        self.states: Int[Tensor, "batch token"] | None = None

    def __len__(self) -> int:
        return int(self.state.count.shape[0])

    def observe(self, token_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None = None) -> None:
        """Read the tokens that a forward is about to read.

        Args:
            token_ids: the chunk.
            attention_mask: (batch, cached + token), as Hugging Face models get it, non-zero where there is a token; its
                last columns are the chunk's. None: no padding.

        Raises:
            ValueError: another number of rows, or a mask of another shape.
        """
        batch, width = token_ids.shape
        if batch != len(self):
            raise ValueError(f"a forward has {batch} rows, but positions are kept of {len(self)}")
        if attention_mask is None:
            real = torch.ones_like(token_ids, dtype=torch.bool)
        elif attention_mask.ndim == 2 and attention_mask.shape[0] == batch and attention_mask.shape[1] >= width:
            real = attention_mask[:, attention_mask.shape[1] - width :].to(token_ids.device) != 0
        else:
            raise ValueError(
                f"an attention mask of shape {tuple(attention_mask.shape)} does not belong to tokens of shape {(batch, width)}"
            )
        if self.state.count.device != token_ids.device:
            self.state = self.state.to(token_ids.device)
        self.state, self.states = advance(self.state, self.marks, token_ids, real)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order."""
        self.state = self.state.select(rows)
        self.states = None

    def join(self, other: Positions) -> None:
        """Put the rows of `other`, kept with the same marks, behind these.

        Raises:
            ValueError: `other` has other marks.
        """
        if other.marks != self.marks:
            raise ValueError("batches with different marks cannot be joined")
        self.state = self.state.join(other.state)
        self.states = None
