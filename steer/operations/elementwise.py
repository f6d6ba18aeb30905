"""Operations whose every element needs itself alone: scale, add (low-rank, dense, a bias), set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations.operation import (
    Region,
    Source,
    check_head_columns,
    check_shape,
    checked_heads,
    checked_tensor,
    checked_weight,
    columns_of,
    digest_of,
    tensor_hash,
)

Piece = Float[Tensor, "rows width"]


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
        return block * (1.0 + self.weight * (self.factor - 1.0))

    def scaled(self, scale: float) -> Scale:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        heads = None if self.heads is None else list(self.heads)
        named = {"operation": "scale", "matrix": self.matrix.key, "heads": heads}
        return named | {"factor": self.factor, "weight": self.weight}


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


@dataclass(frozen=True, eq=False)
class AddDense:
    """W <- W + weight delta.

    Args:
        matrix: what it touches.
        delta: shape (out, in): a tensor, which is kept as it is and not copied, so that a map of a file stays one;
            or a `Source`, read piece by piece.
        weight: its strength.
        known: what `digest` returns, where that is known without reading the delta.
    """

    matrix: Matrix
    delta: Float[Tensor, "out in"] | Source = field(repr=False)
    weight: float = 1.0
    known: str | None = field(default=None, repr=False)
    heads: ClassVar[None] = None
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_weight(self.matrix, self.weight)
        if isinstance(self.delta, Tensor):
            object.__setattr__(self, "delta", checked_tensor(self.matrix, "delta", self.delta, 2, copy=False))

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The delta; a `Source` is read, in float32, whenever it is looked up, and not before."""
        return {"delta": self.delta} if isinstance(self.delta, Tensor) else _Read(self.delta)

    def digest(self) -> str:
        """Return the hash of the delta, or of what it would be read from."""
        if self.known is None:
            found = tensor_hash(self.delta) if isinstance(self.delta, Tensor) else self.delta.digest()
            object.__setattr__(self, "known", found)
        assert self.known is not None
        return self.known

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return the whole matrix."""
        return Region(slice(0, self.delta.shape[0]), (slice(0, self.delta.shape[1]),))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where the delta has another shape than the matrix."""
        check_shape(self.matrix, "difference", tuple(self.delta.shape), shape)

    def change(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return weight delta."""
        delta = self.delta[rows, columns].double() if isinstance(self.delta, Tensor) else self.delta.read(rows, columns)
        return delta if self.weight == 1 else delta * self.weight

    def act(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return the sum."""
        return block + self.change(block, rows, columns)

    def scaled(self, scale: float) -> AddDense:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the delta."""
        return {"operation": "add_dense", "matrix": self.matrix.key, "weight": self.weight}


@dataclass(frozen=True)
class _Read(Mapping[str, Tensor]):
    """A `Source` as a mapping of one tensor, which is made anew for everyone who asks."""

    source: Source

    def __getitem__(self, name: str) -> Tensor:
        if name != "delta":
            raise KeyError(name)
        out, into = self.source.shape
        whole = torch.empty(out, into, dtype=torch.float32)
        step = max(1, (1 << 18) // max(1, into))
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            whole[rows] = self.source.read(rows, slice(0, into))
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(("delta",))

    def __len__(self) -> int:
        return 1


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


@dataclass(frozen=True, eq=False)
class SetSlice:
    """W[rows, columns] <- values.

    Args:
        matrix: what it touches.
        rows, columns: start and stop.
        values: of that shape; each comes out as it is, rounded to the dtype of the matrix.
        weight: 1, or 0 to leave it out.

    Raises:
        SteerError: another weight, an empty or negative slice, or values of another shape.
    """

    matrix: Matrix
    rows: tuple[int, int]
    columns: tuple[int, int]
    values: Float[Tensor, "rows columns"] = field(repr=False)
    weight: float = 1.0
    heads: ClassVar[None] = None
    reduces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weight not in (0, 1):
            raise _no_half(self.matrix, self.weight)
        if not (0 <= self.rows[0] < self.rows[1] and 0 <= self.columns[0] < self.columns[1]):
            raise SteerError(
                f"the slice of {self.matrix} is rows {self.rows} and columns {self.columns}", "(start, stop) from 0 on"
            )
        object.__setattr__(self, "rows", (int(self.rows[0]), int(self.rows[1])))
        object.__setattr__(self, "columns", (int(self.columns[0]), int(self.columns[1])))
        values = checked_tensor(self.matrix, "values", self.values, 2)
        size = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        check_shape(self.matrix, "values", tuple(values.shape), size)
        object.__setattr__(self, "values", values)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The values, on the CPU."""
        return {"values": self.values}

    def digest(self) -> str:
        """Return the hash of the values."""
        return digest_of(self.tensors)

    def region(self, shape: tuple[int, int], head_width: int) -> Region:
        """Return the slice."""
        return Region(slice(*self.rows), (slice(*self.columns),))

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where the slice leaves the matrix."""
        if self.rows[1] > shape[0] or self.columns[1] > shape[1]:
            raise SteerError(
                f"the slice of {self.matrix} is rows {self.rows} and columns {self.columns}",
                f"one within its shape {list(shape)}",
            )

    def change(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return values - block."""
        return self.act(block, rows, columns) - block

    def act(self, block: Piece, rows: slice, columns: slice) -> Piece:
        """Return the values."""
        top, left = self.rows[0], self.columns[0]
        return self.values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left].double()

    def scaled(self, scale: float) -> SetSlice:
        """Return the operation for scale 1, without effect for 0.

        Raises:
            SteerError: any other scale.
        """
        if scale not in (0, 1):
            raise _no_half(self.matrix, scale)
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the values."""
        place = {"rows": list(self.rows), "columns": list(self.columns)}
        return {"operation": "set_slice", "matrix": self.matrix.key, **place, "weight": self.weight}


def _no_half(matrix: Matrix, scale: float) -> SteerError:
    return SteerError(
        f"values of {matrix} are to be set with scale {scale}",
        "1, or 0 to leave it out, since a value is set or not",
        "Use add_dense with the difference for anything between",
    )
