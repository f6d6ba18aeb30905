"""Add a product of low rank: an adapter (LoRA, arXiv 2106.09685, Eq. 3), as a direction in parameter space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations.operation import (
    Piece,
    Region,
    check_shape,
    checked_tensor,
    checked_weight,
    digest_of,
)


@dataclass(frozen=True, eq=False)
class AddLowRank:
    """W <- W + weight B A, summed over the rank in order.

    Args:
        matrix: what it touches.
        A: shape (rank, in).
        B: shape (out, rank).
        weight: its strength.

    Raises:
        SteerError: the shapes do not go together, the rank is 0, or a number is not finite.
    """

    matrix: Matrix
    A: Float[Tensor, "rank in"] = field(repr=False)
    B: Float[Tensor, "out rank"] = field(repr=False)
    weight: float = 1.0
    heads: ClassVar[None] = None
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_weight(self.matrix, self.weight)
        for name in ("A", "B"):
            object.__setattr__(self, name, checked_tensor(self.matrix, name, getattr(self, name), 2))
        if self.A.shape[0] != self.B.shape[1] or not self.A.shape[0]:
            raise SteerError(
                f"the factors for {self.matrix} have the shapes A {list(self.A.shape)} and B {list(self.B.shape)}",
                "A (rank, in) and B (out, rank) of one rank above 0",
            )

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """A and B, on the CPU."""
        return {"A": self.A, "B": self.B}

    def digest(self) -> str:
        """Return the hash of A and B."""
        return digest_of(self.tensors)

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return the whole matrix."""
        return Region(slice(0, self.B.shape[0]), (slice(0, self.A.shape[1]),))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where B A has another shape than the matrix."""
        check_shape(self.matrix, "product B A", (self.B.shape[0], self.A.shape[1]), shape)

    def change(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return weight B A: term by term, since a matrix product is summed differently from machine to machine."""
        into, out = self.factors(rows, columns)
        total = out[:, :1] * into[:1]
        for index in range(1, into.shape[0]):
            total += out[:, index : index + 1] * into[index : index + 1]
        return total

    def act(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return the sum."""
        return block + self.change(block, rows, columns)

    def factors(self, rows: slice, columns: slice) -> tuple[Float[Tensor, "rank width"], Float[Tensor, "rows rank"]]:
        """Return (A of these columns, weight B of these rows) in float64."""
        return self.A[:, columns].double(), self.weight * self.B[rows].double()

    def scaled(self, scale: float) -> AddLowRank:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the factors."""
        return {"operation": "add_low_rank", "matrix": self.matrix.key, "weight": self.weight}
