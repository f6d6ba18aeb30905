"""A key-value cache whose rows can be dropped, repeated and joined.

Every layer keeps all tokens, sliding windows too (the model's mask still hides what lies outside the window), so that
columns mean the same in all layers. Rows are aligned at their right end. Buffers grow in steps, so that a decoding
step writes one column instead of copying the whole cache. A layer with linear attention has no columns: it keeps one
state per row, which is dropped, repeated and joined with its row.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

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

    def select(self, rows: Int[Tensor, " kept"], skip: int) -> None:
        """Keep these rows without their first `skip` columns."""
        index = rows.to(self.buffers[0].device)
        self._replace([buffer[:, :, skip : self.length].index_select(0, index) for buffer in self.buffers])

    def join(self, added: GrowingLayer) -> None:
        """Put the rows of `added` behind these, aligned at the right."""
        length = max(self.length, added.length)
        joined = []
        for first, second in zip(self.buffers, added.buffers, strict=True):
            rows, more = first.shape[0], second.shape[0]
            whole = first.new_zeros(rows + more, first.shape[1], length, first.shape[3])
            whole[:rows, :, length - self.length :] = first[:, :, : self.length]
            whole[rows:, :, length - added.length :] = second[:, :, : added.length]
            joined.append(whole)
        self._replace(joined)

    def _replace(self, buffers: list[Tensor]) -> None:
        self.length = buffers[0].shape[2]
        self.buffers = buffers
        self.keys, self.values = buffers


def _resized(columns: Tensor, capacity: int) -> Tensor:
    grown = columns.new_empty(*columns.shape[:2], capacity, columns.shape[3])
    grown[:, :, : columns.shape[2]] = columns
    return grown


class RecurrentLayer(LinearAttentionLayer):
    """The states of one layer with linear attention: of its convolution and of its recurrence, rows first."""

    def select(self, rows: Int[Tensor, " kept"], skip: int) -> None:
        """Keep these rows; a state has no columns to skip."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.index_select(0, rows.to(state.device))

    def join(self, added: RecurrentLayer) -> None:
        """Put the rows of `added` behind these."""
        pairs = ((self.conv_states, added.conv_states), (self.recurrent_states, added.recurrent_states))
        for states, more in pairs:
            for index, state in states.items():
                other = more[index]
                if state is not None and other is not None:
                    states[index] = torch.cat([state, other])


class RowCache(Cache):
    """A cache of layers whose rows can be dropped, repeated and joined.

    Args:
        linear: the layers with linear attention.
        layers: how many the model has, where there are such layers; others are made when they are first written.
    """

    def __init__(self, linear: Collection[int] = (), layers: int = 0) -> None:
        if linear:
            super().__init__([RecurrentLayer() if layer in linear else GrowingLayer() for layer in range(layers)])
        else:
            super().__init__(layer_class_to_replicate=GrowingLayer)

    def _held(self) -> list[GrowingLayer | RecurrentLayer]:
        return cast("list[GrowingLayer | RecurrentLayer]", self.layers)

    def select(self, rows: Int[Tensor, " kept"], skip: int = 0) -> None:
        """Keep these rows, in this order and possibly repeated, without their first `skip` columns."""
        for layer in self._held():
            layer.select(rows, skip)

    def join(self, other: RowCache) -> None:
        """Put the rows of `other` behind these; the shorter side gets zeros at the left, which the mask must hide."""
        for layer, added in zip(self._held(), other._held(), strict=True):
            layer.join(added)  # type: ignore[arg-type]
