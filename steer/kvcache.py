"""A key-value cache whose rows can be dropped, repeated and joined.

Every layer keeps all tokens, sliding windows too (the model's mask still hides what lies outside the window), so that
columns mean the same in all layers. Rows are aligned at their right end. Buffers grow in steps, so that a decoding
step writes one column instead of copying the whole cache.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_STEP = 64


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (row, head, column, width), in buffers with room to the right."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self.buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [
            states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.buffers[0].shape[2]:
            self.buffers = [_resized(buffer[:, :, :before], self.length + _STEP) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before : self.length] = states
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns held."""
        return self.length

    def replace(self, buffers: list[Tensor]) -> None:
        """Hold these columns instead."""
        self.length = buffers[0].shape[2]
        self.buffers = buffers
        self.keys, self.values = buffers


def _resized(columns: Tensor, capacity: int) -> Tensor:
    grown = columns.new_empty(*columns.shape[:2], capacity, columns.shape[3])
    grown[:, :, : columns.shape[2]] = columns
    return grown


class RowCache(Cache):
    """A cache of `GrowingLayer`s."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def _held(self) -> list[GrowingLayer]:
        return cast("list[GrowingLayer]", self.layers)

    def select(self, rows: Int[Tensor, " kept"], skip: int = 0) -> None:
        """Keep these rows, in this order and possibly repeated, without their first `skip` columns."""
        for layer in self._held():
            index = rows.to(layer.buffers[0].device)
            layer.replace([buffer[:, :, skip : layer.length].index_select(0, index) for buffer in layer.buffers])

    def join(self, other: RowCache) -> None:
        """Put the rows of `other` behind these; the shorter side gets zeros at the left, which the mask must hide."""
        for layer, added in zip(self._held(), other._held(), strict=True):
            length = max(layer.length, added.length)
            joined = []
            for first, second in zip(layer.buffers, added.buffers, strict=True):
                rows, more = first.shape[0], second.shape[0]
                whole = torch.zeros(
                    rows + more, first.shape[1], length, first.shape[3], dtype=first.dtype, device=first.device
                )
                whole[:rows, :, length - layer.length :] = first[:, :, : layer.length]
                whole[rows:, :, length - added.length :] = second[:, :, : added.length]
                joined.append(whole)
            layer.replace(joined)
