"""What operations add to a matrix, as two factors: for the hook form at `head_out` and for adapters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.operations.add_low_rank import AddLowRank
from steer.operations.edit import BLOCK, WIDTH, wide
from steer.operations.operation import Operation
from steer.operations.project import ProjectColumns


def low_rank(
    matrix: Float[Tensor, "out in"],
    operations: Sequence[Operation],
    head_width: int,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return (A, B) on the CPU with `B @ A` = what `operations` add to `matrix`, before the cast.

    A projection has rank 1, a low-rank addition its own; the rank is their sum. Where they overlap, a projection's row
    of A uses the matrix that the operations before it left, so the sum is the composed change, exactly as `edited`
    makes it.

    Args:
        matrix: any dtype of `DTYPES`, any device.
        operations: all for this one matrix, first to last.
        head_width: columns per head.
        dtype: of the factors, which are made in float64; None: float32, for a float64 matrix float64.

    Raises:
        SteerError: an operation has no factors; the matrix has a dtype that cannot be edited.
    """
    for operation in operations:
        if not isinstance(operation, ProjectColumns | AddLowRank):
            raise SteerError(
                f"the {type(operation).__name__} of {operation.matrix} has no factors of low rank",
                "ProjectColumns or AddLowRank",
                "Use the patch itself, or extract an adapter from the edited checkpoint, which reports its error",
            )
    ranks = [operation.A.shape[0] if isinstance(operation, AddLowRank) else 1 for operation in operations]
    height, width = matrix.shape
    rows = torch.zeros(sum(ranks), width, dtype=torch.float64)
    columns = torch.zeros(height, sum(ranks), dtype=torch.float64)
    whole = slice(0, height)
    for here, acting in _columns(matrix, operations, head_width):
        block = wide(matrix, whole, here)
        for index in acting:
            operation, place = operations[index], slice(sum(ranks[:index]), sum(ranks[: index + 1]))
            if isinstance(operation, AddLowRank):
                rows[place, here], columns[:, place] = operation.factors(whole, here)
            elif isinstance(operation, ProjectColumns):
                rows[place.start, here], columns[:, place.start] = operation.factors(block)
            if index != acting[-1]:
                block = operation.act(block, whole, here)
    dtype = dtype or torch.promote_types(matrix.dtype, torch.float32)
    return rows.to(dtype), columns.to(dtype)


def _columns(matrix: Tensor, operations: Sequence[Operation], head_width: int) -> list[tuple[slice, list[int]]]:
    """Pieces of whole columns, each with the operations that cover it."""
    shape = (matrix.shape[0], matrix.shape[1])
    parts = [operation.region(shape, head_width).columns for operation in operations]
    bounds = sorted({edge for found in parts for part in found for edge in (part.start, part.stop)})
    step, found = max(WIDTH, BLOCK // max(1, shape[0])), []
    for start, stop in pairwise(bounds):
        acting = [
            index for index, of_one in enumerate(parts) if any(p.start <= start and stop <= p.stop for p in of_one)
        ]
        if acting:
            found += [(slice(at, min(at + step, stop)), acting) for at in range(start, stop, step)]
    return found
