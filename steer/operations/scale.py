"""Scale: a matrix, or the columns of some heads, times a number; an expert's down projection times 0 switches it off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations.operation import (
    Piece,
    Region,
    check_head_columns,
    checked_heads,
    checked_weight,
    columns_of,
)


@dataclass(frozen=True, eq=False)
class Scale:
    """W <- W (1 + weight (factor - 1)), of all columns or those of `heads`.

    Raises:
        SteerError: a number is not finite; no head, a head twice.
    """

    matrix: Matrix
    factor: float
    heads: tuple[int, ...] | None = None
    weight: float = 1.0
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_weight(self.matrix, self.weight)
        if not math.isfinite(self.factor):
            raise SteerError(f"the factor for {self.matrix} is {self.factor}", "a finite number")
        object.__setattr__(self, "heads", checked_heads(self.matrix, self.heads))

    @property
    def effective(self) -> float:
        """1 + weight (factor - 1), what the matrix is multiplied by; the factor itself, unrounded, for weight 1."""
        return self.factor if self.weight == 1 else 1.0 + self.weight * (self.factor - 1.0)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """None: a number says it all."""
        return {}

    def digest(self) -> str:
        """Return nothing, since `as_json` says it all."""
        return ""

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return the columns of its heads, or all."""
        return Region(slice(0, shape[0]), columns_of(self.heads, shape, head_width))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where a head is not there."""
        check_head_columns(self.matrix, self.heads, shape, heads)

    def change(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return weight (factor - 1) block."""
        return block * (self.weight * (self.factor - 1.0))

    def act(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return the block times 1 + weight (factor - 1)."""
        return block * self.effective

    def scaled(self, scale: float) -> Scale:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        heads = None if self.heads is None else list(self.heads)
        named = {"operation": "scale", "matrix": self.matrix.key, "heads": heads}
        return named | {"factor": self.factor, "weight": self.weight}
