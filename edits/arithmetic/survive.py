"""What is left of a vector once it is added to weights and the sum is cast.

A tuned model often differs from its parent by less than the spacing of bfloat16 numbers: with weights of size .02 in
bfloat16 and differences of size 2e-5, one rounding leaves 78 % of the numbers as they were, and what is stored is off by
80 % of the wanted difference (simulated; a test repeats it). So what is left is measured, tensor by tensor, without
writing anything.
"""

from __future__ import annotations

import html
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edits.arithmetic.pieces import pieces, seen_as
from edits.arithmetic.selection import kind_of, layer_of
from edits.arithmetic.tables import html_table, lines
from edits.donors import TORCH, Checkpoint, Donor, donor
from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations import Survival
from steer.tables import table

if TYPE_CHECKING:
    import pandas

    from edits.arithmetic.vector import ReasoningVector

COLUMNS = ("tensor", "layer", "module", "wanted", "survived", "cosine", "lost", "unchanged")
MUCH = 0.01  # From this loss on a wider dtype is advised; ours.


@dataclass(frozen=True)
class SurvivingRow:
    """One tensor.

    Attributes:
        matrix: the tensor.
        survival: norms and inner product of the wanted and the stored change.
        wanted_numbers: how many numbers were to change.
        unchanged_numbers: how many of those are as before.
    """

    matrix: Matrix
    survival: Survival
    wanted_numbers: int
    unchanged_numbers: int

    @property
    def lost(self) -> float | None:
        """‖stored change - wanted change‖ / ‖wanted change‖; None where nothing was wanted."""
        return lost(self.survival)

    @property
    def unchanged(self) -> float | None:
        """Share of the numbers that were to change and did not."""
        return self.unchanged_numbers / self.wanted_numbers if self.wanted_numbers else None


@dataclass(frozen=True)
class Surviving:
    """What is left of a vector; prints as a table, shows itself in Jupyter.

    Attributes:
        label: the vector and its strength.
        base: what it was added to.
        dtype: that the sum was cast to; empty: as each tensor of the base is stored.
        rows: by layer.
    """

    label: str
    base: str
    dtype: str
    rows: tuple[SurvivingRow, ...]

    @property
    def total(self) -> Survival:
        """All tensors together."""
        return sum((row.survival for row in self.rows), Survival())

    @property
    def unchanged(self) -> float | None:
        """Share of all numbers that were to change and did not."""
        wanted = sum(row.wanted_numbers for row in self.rows)
        return sum(row.unchanged_numbers for row in self.rows) / wanted if wanted else None

    def summary(self) -> str:
        """Say in one or two sentences what is left, and what to do where that is little."""
        total, dtype = self.total, self.dtype or "the dtype of the base"
        said = (
            f"{self.label} on {self.base} in {dtype}: norm {total.actual:.4g} of {total.wanted:.4g} wanted, cosine "
            f"{_number(total.cosine)}, lost {_number(lost(total))} (relative), {_number(self.unchanged)} of the numbers unchanged"
        )
        if (lost(total) or 0.0) > MUCH:
            said += ". Write the result in float32 to keep the difference: --dtype float32 (dtype=torch.float32)"
        return said

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas table."""
        return table(self.to_dict()["rows"], COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        total = self.total
        sums = {"wanted": total.wanted, "survived": total.share, "cosine": total.cosine, "lost": lost(total)}
        about = {"vector": self.label, "base": self.base, "dtype": self.dtype or None}
        rows = [dict(zip(COLUMNS, self._values(row), strict=True)) for row in self.rows]
        return {**about, **sums, "unchanged": self.unchanged, "rows": rows}

    def __str__(self) -> str:
        return "\n".join([self.summary(), *lines([COLUMNS, *(self._cells(row) for row in self.rows)])])

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(self.summary())}</div>" + html_table(
            COLUMNS, [self._cells(row) for row in self.rows]
        )

    def _values(self, row: SurvivingRow) -> tuple[Any, ...]:
        where = (str(row.matrix), layer_of(row.matrix), kind_of(row.matrix))
        return *where, row.survival.wanted, row.survival.share, row.survival.cosine, row.lost, row.unchanged

    def _cells(self, row: SurvivingRow) -> list[str]:
        return [_number(value) if isinstance(value, float | None) else str(value) for value in self._values(row)]


def lost(survival: Survival) -> float | None:
    """Return ‖stored - wanted‖ / ‖wanted‖ of a change."""
    square = survival.wanted_square + survival.actual_square - 2 * survival.inner
    return math.sqrt(max(0.0, square) / survival.wanted_square) if survival.wanted_square else None


def surviving(
    vector: ReasoningVector, base: str | os.PathLike[str] | Donor, dtype: torch.dtype | None = None, alpha: float = 1.0
) -> Surviving:
    """Measure what `base + alpha * vector`, cast once, keeps of alpha * vector; reads in pieces, writes nothing.

    The change that is left is cast(base + change) - cast(base): against the base as that dtype shows it.

    Args:
        vector: what is added.
        base: a checkpoint.
        dtype: of the result; None keeps each tensor's own.
        alpha: strength.

    Raises:
        SteerError: the base is no checkpoint, or lacks a tensor or has it in another shape.
    """
    opened = donor(base)
    if not isinstance(opened, Checkpoint):
        raise SteerError(f"{opened.label} is no checkpoint by itself", "a folder, a hub id or organism:NAME")
    rows = []
    for matrix in vector.shapes:
        entry = opened.entry(matrix)
        if tuple(entry.shape) != tuple(vector.shapes[matrix]):
            raise SteerError(
                f"{matrix} has the shape {list(entry.shape)} in {opened.label} and {list(vector.shapes[matrix])} in the vector",
                "one shape for both",
            )
        rows.append(_row(vector, opened, matrix, dtype or TORCH[entry.dtype], alpha))
    name = "" if dtype is None else str(dtype).removeprefix("torch.")
    return Surviving(f"{alpha:g} * {vector.label}", opened.label, name, tuple(rows))


def _row(vector: ReasoningVector, base: Checkpoint, matrix: Matrix, dtype: torch.dtype, alpha: float) -> SurvivingRow:
    total, wanted_numbers, unchanged = Survival(), 0, 0
    for rows, columns in pieces(seen_as(vector.shapes[matrix])):
        before, change = base.read(matrix, rows, columns), vector.read(matrix, rows, columns) * alpha
        wanted = (before + change) - before
        actual = _cast(before + change, dtype) - _cast(before, dtype)
        total += Survival(_dot(wanted, wanted), _dot(actual, actual), _dot(wanted, actual))
        asked = wanted != 0
        wanted_numbers += int(asked.sum())
        unchanged += int((asked & (actual == 0)).sum())
    return SurvivingRow(matrix, total, wanted_numbers, unchanged)


def _cast(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).double()


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
