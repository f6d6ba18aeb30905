"""Add a vector to an output bias; one that the model does not have is made of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.operations.operation import (
    Piece,
    Region,
    check_shape,
    checked_tensor,
    checked_weight,
    digest_of,
)


@dataclass(frozen=True, eq=False)
class AddBias:
    """b <- b + weight v, for the output bias of a matrix; where there is none, it is taken for zeros and made.

    Args:
        layer, module, expert: the matrix that the bias goes with.
        vector: v, shape (out,).
        weight: its strength.
    """

    layer: int
    module: str
    vector: Float[Tensor, " out"] = field(repr=False)
    weight: float = 1.0
    expert: int = -1
    heads: ClassVar[None] = None
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_weight(self.matrix, self.weight)
        object.__setattr__(self, "vector", checked_tensor(self.matrix, "vector", self.vector, 1))

    @property
    def matrix(self) -> Matrix:
        """The bias."""
        return Matrix(self.layer, self.module, self.expert, bias=True)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The vector, on the CPU."""
        return {"vector": self.vector}

    def digest(self) -> str:
        """Return the hash of the vector."""
        return digest_of(self.tensors)

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return the whole bias."""
        return Region(slice(0, self.vector.shape[0]), (slice(0, 1),))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where the vector has another length than the bias."""
        check_shape(self.matrix, "vector", (self.vector.shape[0], 1), shape)

    def change(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return weight v."""
        return self.weight * self.vector[rows, None].double()

    def act(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return the sum."""
        return block + self.change(block, rows, columns)

    def scaled(self, scale: float) -> AddBias:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the vector."""
        return {"operation": "add_bias", "matrix": self.matrix.key, "weight": self.weight}
