"""Projection: take a direction out of what a matrix, or some heads of it, write (ThinkEdit, arXiv 2503.22048, Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations.operation import (
    Region,
    check_head_columns,
    checked_heads,
    checked_weight,
    columns_of,
    tensor_hash,
)


class _Kept:
    """One direction in memory, for all operations that project it: a mixture has thousands of experts."""

    _all: ClassVar[WeakValueDictionary[str, _Kept]] = WeakValueDictionary()

    def __init__(self, vector: Tensor, digest: str) -> None:
        self.vector, self.digest = vector, digest

    @classmethod
    def of(cls, vector: Tensor) -> _Kept:
        """Return the one for these numbers."""
        digest = tensor_hash(vector)
        found = cls._all.get(digest)
        if found is None:
            found = cls._all[digest] = cls(vector, digest)
        return found

    @cached_property
    def unit(self) -> Tensor:
        """v̂ in float64."""
        vector = self.vector.double()
        vector = vector / vector.abs().max()
        return vector / sum_rows((vector * vector)[:, None]).sqrt()


@dataclass(frozen=True, eq=False)
class ProjectColumns:
    """W[:, columns of `heads`] <- (I - weight v̂ v̂ᵀ) W[:, columns of `heads`]; of the bias b <- (I - weight v̂ v̂ᵀ) b.

    Args:
        layer: counts from 0; -1 for the embedding, whose matrix (hidden, vocab) is the transpose of what is stored.
        module: a word of the anatomy, such as `attention_output`.
        heads: query heads, in any order; one operation serves all heads that share the vector; None: all columns.
        vector: v, any norm but 0 and any sign, shape (out,); normalised in float64 when it is used.
        weight: w; 1 removes the component along v, 0 changes nothing.
        expert: counts from 0; -1 where there is none.
        bias: the bias of the matrix in its place.

    Raises:
        SteerError: no head, a head twice, a negative number, an unknown module, a vector that is zero or not finite.
    """

    layer: int
    module: str
    heads: tuple[int, ...] | None
    vector: Float[Tensor, " out"] = field(repr=False)
    weight: float = 1.0
    expert: int = -1
    bias: bool = False
    _kept: _Kept = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", checked_heads(self.matrix, self.heads))
        checked_weight(self.matrix, self.weight)
        vector = self.vector.detach().to("cpu", torch.float32, copy=True)
        if vector.dim() != 1 or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise SteerError(
                f"the direction of {self.matrix} has shape {tuple(vector.shape)}, or is zero or not finite",
                "one finite vector of the model's hidden size that is not zero",
                "Leave this layer out, or collect the direction from more traces",
            )
        kept = _Kept.of(vector)
        object.__setattr__(self, "vector", kept.vector)
        object.__setattr__(self, "_kept", kept)

    @property
    def matrix(self) -> Matrix:
        """The matrix that it touches."""
        return Matrix(self.layer, self.module, self.expert, self.bias)

    @property
    def reduces(self) -> bool:
        """True: v̂ᵀ W sums over a column."""
        return True

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The vector, float32 on the CPU."""
        return {"vector": self.vector}

    def digest(self) -> str:
        """Return the hash of the vector."""
        return self._kept.digest

    @property
    def unit(self) -> Float[Tensor, " out"]:
        """v̂ in float64."""
        return self._kept.unit

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return whole columns."""
        return Region(slice(0, self.vector.shape[0]), columns_of(self.heads, shape, head_width))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where it does not fit a matrix (out, in) whose input is split over `heads`."""
        if self.vector.shape[0] != shape[0]:
            raise SteerError(
                f"the direction of {self.matrix} has {self.vector.shape[0]} numbers and the matrix has {shape[0]} rows",
                "a direction made on this model",
            )
        check_head_columns(self.matrix, self.heads, shape, heads)

    def change(self, block: Float[Tensor, "rows width"], rows: slice, columns: slice) -> Float[Tensor, "rows width"]:
        """Return -w v̂ (v̂ᵀ block)."""
        along, column = self.factors(block)
        return column[:, None] * along[None, :]

    def act(self, block: Float[Tensor, "rows width"], rows: slice, columns: slice) -> Float[Tensor, "rows width"]:
        """Return the block without its component."""
        return block + self.change(block, rows, columns)

    def factors(self, block: Float[Tensor, "out width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " out"]]:
        """Return (v̂ᵀ block, -w v̂), whose outer product is the change."""
        unit = self.unit
        return sum_rows(unit[:, None] * block), -self.weight * unit

    def scaled(self, scale: float) -> ProjectColumns:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the vector."""
        return {
            "operation": "project_out",
            "matrix": self.matrix.key,
            "heads": None if self.heads is None else list(self.heads),
            "weight": self.weight,
        }


def sum_rows(values: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Sum over rows by a fixed tree of additions, so that the bytes depend on nothing but the values."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        folded = values[:half] + values[half : 2 * half]
        values = torch.cat([folded, values[2 * half :]]) if values.shape[0] % 2 else folded
    return values[0]
