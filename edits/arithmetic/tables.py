"""A reasoning vector by layer and kind of module: where it is large, absolutely and against the weights."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edits.arithmetic.pieces import seen_as, square_norm
from edits.arithmetic.selection import OUTSIDE, in_order, kind_of, layer_of
from steer.anatomy.slots import Matrix
from steer.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from edits.arithmetic.vector import ReasoningVector

COLUMNS = ("layer", "module", "tensors", "differing", "numbers", "norm", "relative")


@dataclass(frozen=True)
class LayerRow:
    """The tensors of one kind in one layer; experts count together.

    Attributes:
        layer: -1 outside of the layers.
        module: what the tensors share, such as `self_attn.q_proj`.
        tensors, differing: how many there are, and how many are not zero.
        numbers: in all of them.
        norm: Frobenius norm, strengths and all.
        relative: norm over the Frobenius norm of the same tensors of the model that was subtracted; None where there
            is none (adapters by themselves) or it is zero.
    """

    layer: int
    module: str
    tensors: int
    differing: int
    numbers: int
    norm: float
    relative: float | None


@dataclass(frozen=True)
class LayerTable:
    """Rows by layer and module; prints as a table, shows itself in Jupyter.

    Attributes:
        label: the vector.
        rows: in order of layer.
    """

    label: str
    rows: tuple[LayerRow, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm over all rows."""
        return math.sqrt(math.fsum(row.norm**2 for row in self.rows))

    def layers(self) -> dict[int, float]:
        """Return the norm of each layer, -1 for what is outside of the layers."""
        squares: dict[int, float] = {}
        for row in self.rows:
            squares[row.layer] = squares.get(row.layer, 0.0) + row.norm**2
        return {layer: math.sqrt(square) for layer, square in squares.items()}

    def summary(self) -> str:
        """Say in one line how large it is and where."""
        tensors, differing = (sum(getattr(row, name) for row in self.rows) for name in ("tensors", "differing"))
        largest = max(self.layers().items(), key=lambda pair: pair[1], default=(OUTSIDE, 0.0))
        where = "outside of the layers" if largest[0] == OUTSIDE else f"in layer {largest[0]}"
        return f"{self.label}: norm {self.norm:.6g}, {differing} of {tensors} tensors differ, largest {where} ({largest[1]:.4g})"

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas table."""
        return table(self.to_dict()["rows"], COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        rows = [{name: getattr(row, name) for name in COLUMNS} for row in self.rows]
        return {"vector": self.label, "norm": self.norm, "rows": rows}

    def plot(self) -> Figure:
        """Draw the norm by layer, and the relative norm by layer and module."""
        from edits.arithmetic.plots import layers_figure

        return layers_figure(self)

    def __str__(self) -> str:
        return "\n".join([self.summary(), *lines([COLUMNS, *(self._cells(row) for row in self.rows)])])

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(self.summary())}</div>" + html_table(
            COLUMNS, [self._cells(row) for row in self.rows]
        )

    def _cells(self, row: LayerRow) -> tuple[str, ...]:
        layer = "outside" if row.layer == OUTSIDE else str(row.layer)
        relative = "–" if row.relative is None else f"{row.relative:.4g}"
        return layer, row.module, str(row.tensors), str(row.differing), f"{row.numbers:,}", f"{row.norm:.4g}", relative


def layer_table(vector: ReasoningVector) -> LayerTable:
    """Return the norms of a vector by layer and module; one pass over the vector and one over what was subtracted."""
    base = next((each for number, each in vector.terms if number < 0 and each.whole), None)
    norms = vector.norms()
    groups: dict[tuple[int, str], list[Matrix]] = {}
    for matrix in in_order(vector.shapes):
        groups.setdefault((layer_of(matrix), kind_of(matrix)), []).append(matrix)
    rows = []
    for (layer, kind), matrices in groups.items():
        norm = math.sqrt(math.fsum(norms[each] ** 2 for each in matrices))
        under = math.sqrt(math.fsum(square_norm(base, each) for each in matrices)) if base is not None else 0.0
        numbers = sum(math.prod(seen_as(vector.shapes[each])) for each in matrices)
        differing = sum(norms[each] != 0 for each in matrices)
        rows.append(LayerRow(layer, kind, len(matrices), differing, numbers, norm, norm / under if under else None))
    return LayerTable(vector.label, tuple(rows))


def lines(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return rows of cells as lines, columns aligned."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def html_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return cells as a table of HTML."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
