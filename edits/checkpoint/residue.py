"""What a projection left of its direction: v̂ᵀW before and after, measured without the function that edits.

After W <- (I - w v̂v̂ᵀ) W the component is v̂ᵀW' = (1 - w) v̂ᵀW; several projections of one matrix act in turn. Here
the formula is carried out plainly in float64 and compared with what is stored. The stored numbers were rounded once,
each by at most u times itself, so by Cauchy and Schwarz

    |v̂ᵀ(stored - exact)| <= u ‖exact column‖

whatever the numbers are. Beside it stands a tolerance relative to what was there before, which is the smaller one as
long as the direction was there: 1e-6 in fp32, 2e-3 in fp16, 1e-2 in bf16 (ours; rounding errors that know nothing of
v̂ leave about u / sqrt(3)). The larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from edits.checkpoint.pieces import TORCH
from edits.checkpoint.touched import SlotEdit
from steer.anatomy.slots import Matrix
from steer.operations import ProjectColumns

RELATIVE = {"F64": 1e-12, "F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}
COLUMNS = 256
Columns = Callable[[slice], NDArray[np.float64]]


@dataclass(frozen=True)
class Residue:
    """What one projection left, as the largest absolute value over its columns.

    Attributes:
        matrix: that was projected.
        weight: w of the operation.
        before: max |v̂ᵀW| in the base.
        after: max |v̂ᵀW'| in the edited checkpoint.
        wanted: max |v̂ᵀW'| before the cast, by the formula.
        gap: max |v̂ᵀ(stored - exact)|.
        tolerance: what the gap was held against.
    """

    matrix: Matrix
    weight: float
    before: float
    after: float
    wanted: float
    gap: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the gap is within the tolerance."""
        return self.gap <= self.tolerance


def residues(before: Columns, after: Columns, shape: tuple[int, int], dtype: str, edit: SlotEdit) -> list[Residue]:
    """Measure every projection of one matrix.

    Args:
        before, after: give some columns of the stored matrix, base and edited.
        shape: of the matrix (out, in).
        dtype: that the edited matrix is stored in.
        edit: all that is done to the matrix; projections only.
    """
    operations = [each for each in edit.operations if isinstance(each, ProjectColumns) and each.weight]
    found = np.zeros((len(operations), 5))  # before, after, wanted, gap, largest ‖exact column‖
    units = [_unit(operation) for operation in operations]
    step = edit.head_width if any(operation.heads is not None for operation in operations) else COLUMNS
    for start in range(0, shape[1], step):
        here = [each.heads is None or start // edit.head_width in each.heads for each in operations]
        if any(here):
            columns = slice(start, min(start + step, shape[1]))
            base, stored = before(columns), after(columns)
            exact = base.copy()
            for operation, unit, acts in zip(operations, units, here, strict=True):
                if acts:
                    exact = exact - operation.weight * np.outer(unit, unit @ exact)
            length = np.linalg.norm(exact, axis=0).max()
            for index, (unit, acts) in enumerate(zip(units, here, strict=True)):
                if acts:
                    parts = (unit @ base, unit @ stored, unit @ exact, unit @ (stored - exact))
                    row = [*(float(np.abs(part).max()) for part in parts), length]
                    found[index] = np.maximum(found[index], row)
    rounding = torch.finfo(TORCH[dtype]).eps / 2 * (1 + 2**-10)
    return [
        Residue(
            operation.matrix,
            operation.weight,
            float(row[0]),
            float(row[1]),
            float(row[2]),
            float(row[3]),
            float(max(RELATIVE[dtype] * row[0], rounding * row[4])),
        )
        for operation, row in zip(operations, found, strict=True)
    ]


def _unit(operation: ProjectColumns) -> Float[np.ndarray, " out"]:
    vector = operation.vector.double().numpy()
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit
