"""The one function that changes weights, piece by piece in float64, and how much of the change survived the cast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from steer.errors import SteerError
from steer.operations import exponents
from steer.operations.operation import DTYPES, Operation, Region

BLOCK = 1 << 17  # Numbers in a piece: one megabyte of float64.
WIDTH = 64  # Columns in a piece of whole columns, at least: rows are read from memory line by line.

Acting = tuple[tuple[Operation, Region], ...]


@dataclass(frozen=True)
class Block:
    """One piece before and after: `exact` in float64, `after` in the weight's dtype, both on the CPU."""

    rows: slice
    columns: slice
    before: Float[Tensor, "rows width"]
    exact: Float[Tensor, "rows width"]
    after: Shaped[Tensor, "rows width"]


@dataclass(frozen=True)
class Survival:
    """How much of the wanted change is left after the cast; blocks and matrices add up.

    Attributes:
        wanted_square: squared Frobenius norm of the change before the cast.
        actual_square: squared Frobenius norm of the change that the stored numbers show.
        inner: inner product of the two.
    """

    wanted_square: float = 0.0
    actual_square: float = 0.0
    inner: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.wanted_square + other.wanted_square, self.actual_square + other.actual_square, self.inner + other.inner
        )

    @property
    def wanted(self) -> float:
        """Frobenius norm of the wanted change."""
        return math.sqrt(self.wanted_square)

    @property
    def actual(self) -> float:
        """Frobenius norm of the change that was stored."""
        return math.sqrt(self.actual_square)

    @property
    def share(self) -> float | None:
        """`actual / wanted`; None where nothing was wanted."""
        return self.actual / self.wanted if self.wanted else None

    @property
    def cosine(self) -> float | None:
        """Cosine between the wanted and the stored change; None where one of them is zero."""
        return self.inner / (self.wanted * self.actual) if self.wanted and self.actual else None

    @classmethod
    def of(cls, block: Block) -> Survival:
        """Measure one block."""
        wanted = (block.exact - block.before).reshape(-1)
        actual = (block.after.double() - block.before).reshape(-1)
        return cls(float(wanted @ wanted), float(actual @ actual), float(wanted @ actual))


def edited_blocks(
    matrix: Shaped[Tensor, "out in"],
    operations: Sequence[Operation],
    head_width: int,
    origin: tuple[int, int] = (0, 0),
) -> Iterator[Block]:
    """Carry out `operations` on the pieces of `matrix` that they touch.

    Args:
        matrix: any dtype of `DTYPES`, or the block exponents of MXFP4, any device, any strides; it is not changed here.
        operations: all for this one matrix, first to last.
        head_width: columns per head, `in / heads`.
        origin: first row and column of the logical matrix that are here; a projection needs its whole columns.

    Yields:
        The touched pieces, which do not overlap, with bounds counted from the beginning of `matrix`; every other
        element keeps its bytes.

    Raises:
        SteerError: the weight's dtype is none of `DTYPES`; a projection does not see whole columns.
    """
    top, left = origin
    for rows, columns, acting in _pieces(matrix, operations, head_width, origin):
        before = wide(matrix, rows, columns)
        exact = before
        for operation, region in acting:
            start, stop = max(region.rows.start - top, rows.start), min(region.rows.stop - top, rows.stop)
            here = slice(start + top, stop + top), slice(columns.start + left, columns.stop + left)
            if (start, stop) == (rows.start, rows.stop):
                exact = operation.act(exact, *here)
            elif start < stop:
                inner = slice(start - rows.start, stop - rows.start)
                exact = exact.clone() if exact is before else exact
                exact[inner] = operation.act(exact[inner], *here)
        if exact is not before:
            yield Block(rows, columns, before, exact, exact.to(matrix.dtype))


def _pieces(
    matrix: Tensor, operations: Sequence[Operation], head_width: int, origin: tuple[int, int]
) -> Iterator[tuple[slice, slice, Acting]]:
    """Cut what operations touch into pieces that every operation either covers in all columns or leaves alone."""
    (top, left), (height, width) = origin, matrix.shape
    seen = (top + height, left + width)
    regions = [(operation, operation.region(seen, head_width)) for operation in operations if operation.weight != 0]
    edges = {edge - left for _, region in regions for part in region.columns for edge in (part.start, part.stop)}
    bounds = sorted({min(max(edge, 0), width) for edge in edges})
    for start, stop in pairwise(bounds):
        acting = tuple(
            (operation, region)
            for operation, region in regions
            if any(part.start <= start + left and stop + left <= part.stop for part in region.columns)
        )
        if not acting:
            continue
        if any(operation.reduces for operation, _ in acting):
            _check_whole_columns(acting, top, height)
            rows, step = (0, height), (height, max(WIDTH, BLOCK // max(1, height)))
        else:
            rows = (
                max(0, min(region.rows.start for _, region in acting) - top),
                min(height, max(region.rows.stop for _, region in acting) - top),
            )
            step = _step(matrix, rows[1] - rows[0], stop - start)
        for row, column in _corners(matrix, rows, (start, stop), step):
            yield (
                slice(row, min(row + step[0], rows[1])),
                slice(column, min(column + step[1], stop)),
                acting,
            )


def _step(matrix: Tensor, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a piece of `BLOCK` numbers that lie as close together as they can."""
    if _is_turned(matrix):
        inner = max(1, min(height, BLOCK))
        return inner, max(1, BLOCK // inner)
    inner = max(1, min(width, BLOCK))
    return max(1, BLOCK // inner), inner


def _corners(
    matrix: Tensor, rows: tuple[int, int], columns: tuple[int, int], step: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """The first row and column of every piece, in the order in which they lie in memory."""
    if _is_turned(matrix):
        return ((row, column) for column in range(*columns, step[1]) for row in range(*rows, step[0]))
    return ((row, column) for row in range(*rows, step[0]) for column in range(*columns, step[1]))


def _is_turned(matrix: Tensor) -> bool:
    return matrix.stride(0) < matrix.stride(1)


def _check_whole_columns(acting: Acting, top: int, height: int) -> None:
    for operation, region in acting:
        if operation.reduces and (top != 0 or region.rows.stop != height):
            raise SteerError(
                f"a projection of {operation.matrix} was given rows {top} to {top + height}",
                f"rows 0 to {region.rows.stop}, since it sums over whole columns",
            )


def edit_(
    matrix: Shaped[Tensor, "out in"],
    operations: Sequence[Operation],
    head_width: int,
    origin: tuple[int, int] = (0, 0),
) -> Survival:
    """Write the result of `operations` into `matrix`, and say how much of the change survived the cast.

    Args: see `edited_blocks`.

    Raises:
        SteerError: as `edited_blocks`; a finite number would become infinite or NaN; block exponents would not be exact.
    """
    survival = Survival()
    for block in edited_blocks(matrix, operations, head_width, origin):
        if matrix.dtype == exponents.DTYPE:
            _refuse_inexact(block, operations[0])
        measured = Survival.of(block)
        if not math.isfinite(measured.actual_square):
            _refuse_lost(block, operations[0])
        matrix[block.rows, block.columns] = block.after.to(matrix.device)
        survival += measured
    return survival


def _refuse_lost(block: Block, operation: Operation) -> None:
    """Refuse what is too large for the weight's dtype, or NaN; numbers that were so before are let be."""
    lost = int((~torch.isfinite(block.after) & torch.isfinite(block.before)).sum())
    if lost:
        raise SteerError(
            f"the patch would make {lost} numbers of {operation.matrix} infinite or NaN",
            f"finite numbers, up to {torch.finfo(block.after.dtype).max:g} in {block.after.dtype}",
            "Take a smaller strength, write wider numbers (--dtype float32), or look for NaN in what is added",
        )


def _refuse_inexact(block: Block, operation: Operation) -> None:
    """Refuse exponents that leave the range of a byte, or that are no numbers (255) to begin with."""
    lost = int((block.after.double() != block.exact).sum())
    if lost:
        raise SteerError(
            f"the patch would take {lost} block exponents of {operation.matrix} out of their range",
            f"exponents from 0 to {exponents.LARGEST}, before and after",
            "Take a factor nearer to 1, dequantise the model first, or use the hook form",
        )


def edited(
    matrix: Shaped[Tensor, "out in"], operations: Sequence[Operation], head_width: int
) -> Shaped[Tensor, "out in"]:
    """Return the matrix after `operations`, on its device and in its dtype; `matrix` itself is not changed.

    Raises:
        SteerError: the weight's dtype is none of `DTYPES`.
    """
    result = matrix.detach().clone(memory_format=torch.contiguous_format)
    edit_(result, operations, head_width)
    return result


def wide(matrix: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return a copy of a piece in float64 on the CPU, row by row in memory.

    Raises:
        SteerError: the dtype is none of `DTYPES`.
    """
    if matrix.dtype not in (*DTYPES, exponents.DTYPE):
        raise SteerError(
            f"the weight has dtype {matrix.dtype}",
            f"one of {', '.join(str(dtype) for dtype in DTYPES)}",
            "Edit the unquantised model",
        )
    piece = matrix.detach()[rows, columns].to("cpu")
    return torch.empty(piece.shape, dtype=torch.float64).copy_(piece)
