"""What `edits.diff` found: values that print, become tables and draw themselves."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edits.checkpoint.change import LIMIT, Change
from edits.checkpoint.others import Setting, UnequalFile
from steer.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SHOWN = 20
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
COLUMNS = (
    "tensor", "kind", "layer", "shape", "dtype", "max", "norm", "relative", "changed", "rank", "captured", "not_finite",
)  # fmt: skip


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs.

    Attributes:
        name: on disk; of the side with the smaller parts where one side stores many matrices as one tensor.
        shape: as the side of that name stores it.
        dtypes: of both sides, as safetensors spells them.
        change: size, spread and rank of the difference.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    change: Change

    @property
    def layer(self) -> int | None:
        """Counts from 0; None outside the layers."""
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        """What the tensor is called within its layer, all experts as one: `mlp.experts.*.down_proj`."""
        match = _LAYER.search(self.name)
        inner = self.name[match.end() :] if match else self.name
        return _EXPERT.sub(".experts.*.", inner).removesuffix(".weight")

    def row(self) -> dict[str, Any]:
        """Its line in a table."""
        change = self.change
        dtypes = dict.fromkeys(self.dtypes)
        values = (
            self.name, self.kind, self.layer, "x".join(map(str, self.shape)), " -> ".join(dtypes), change.largest,
            change.norm, change.relative, change.share, change.rank, change.captured, change.not_finite,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


@dataclass(frozen=True)
class Reshaped:
    """A tensor that both sides have, in shapes that cannot be subtracted."""

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ. Prints as a table, largest relative change first.

    Attributes:
        first, second: their names.
        tensors: how many there are: in both, in one, and in shapes that cannot be subtracted.
        differing: those that could be compared and differ, largest relative change first.
        equal: how many were read and have the same bytes.
        same_file: how many are the same bytes of the same file (hard or symbolic links), so that none was read.
        reshaped: those of two shapes.
        only_first, only_second: names that only one side has.
        regrouped: how many tensors or parts of one were compared with a tensor of another name, such as an expert that is
            stored apart on one side and with all others on the other; each counts as a tensor.
        unknown: why tensors of different names could not be paired, where that was not possible.
        config: keys of config.json that differ.
        files: other files that differ.
        limit: up to which rank was counted; 0 for no rank.
        layers: how many layers the names count, changed or not.
    """

    first: str
    second: str
    tensors: int
    differing: tuple[TensorDifference, ...] = field(repr=False)
    equal: int = 0
    same_file: int = 0
    reshaped: tuple[Reshaped, ...] = ()
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    regrouped: int = 0
    unknown: str = ""
    config: tuple[Setting, ...] = ()
    files: tuple[UnequalFile, ...] = ()
    limit: int = LIMIT
    layers: int = 0

    @property
    def count(self) -> int:
        """Tensors that are not the same on both sides."""
        return len(self.differing) + len(self.reshaped) + len(self.only_first) + len(self.only_second)

    @property
    def same(self) -> bool:
        """Whether nothing differs: no tensor, no configuration, no file."""
        return not (self.count or self.config or self.files)

    def rank_text(self, change: Change) -> str:
        """Return the rank as text: `3`, `> 64`, or a dash where there is none."""
        if change.rank is None:
            return "–"
        return f"> {self.limit}" if change.rank > self.limit else str(change.rank)

    def rows(self) -> list[dict[str, Any]]:
        """One row per differing tensor; `rank` is `limit + 1` where it is larger than the limit."""
        return [tensor.row() for tensor in self.differing]

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas table.

        Raises:
            SteerError: pandas is not installed.
        """
        return table(self.rows(), COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "first": self.first,
            "second": self.second,
            "same": self.same,
            "tensors": self.tensors,
            "differ": self.count,
            "equal": self.equal,
            "same_file": self.same_file,
            "regrouped": self.regrouped,
            "unknown": self.unknown,
            "differing": self.rows(),
            "reshaped": [
                {"tensor": each.name, "first": list(each.first), "second": list(each.second)} for each in self.reshaped
            ],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "config": [{"key": each.key, "first": each.first, "second": each.second} for each in self.config],
            "files": [{"file": each.name, "how": each.how, "keys": list(each.keys)} for each in self.files],
            "rank_limit": self.limit,
            "layers": self.layers,
        }

    def plot(self) -> Figure:
        """Draw the relative change of every kind of tensor in every layer, and of what lies outside the layers."""
        from edits.difference_figure import difference_figure

        return difference_figure(self)

    def summary(self) -> list[str]:
        """The comparison in sentences."""
        known = f"{self.equal} equal by reading, {self.same_file} the same file"
        lines = [f"{self.count} of {self.tensors} tensors differ ({known})"]
        if self.regrouped:
            lines.append(f"{self.regrouped} were compared with a tensor of another name (the layouts differ)")
        if self.unknown:
            lines.append(self.unknown)
        lines += [_named("only in the first", self.only_first), _named("only in the second", self.only_second)]
        shapes = [f"{each.name} {list(each.first)} against {list(each.second)}" for each in self.reshaped]
        lines += [_named("other shape", shapes), *(f"config.json: {setting}" for setting in self.config)]
        return [line for line in lines if line] + [str(file) for file in self.files]

    def text(self, shown: int | None = SHOWN) -> str:
        """Return summary and table; `shown` rows of it, all for None."""
        rows = [self._cells(tensor) for tensor in self.differing[:shown]]
        lines = [f"{self.first} -> {self.second}", *self.summary()]
        if rows:
            head = ("tensor", "shape", "dtype", "max |a-b|", "|a-b|/|a|", "changed", "rank")
            widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
            for row in (head, *rows):
                left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
                right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
                lines.append("  " + "  ".join([*left, *right]))
        if len(self.differing) > len(rows):
            lines.append(f"  … and {len(self.differing) - len(rows)} more")
        return "\n".join(lines)

    def _cells(self, tensor: TensorDifference) -> tuple[str, ...]:
        row, change = tensor.row(), tensor.change
        relative = "inf" if math.isinf(change.relative) else f"{change.relative:.3g}"
        more = f" ({change.not_finite} not finite)" if change.not_finite else ""
        figures = (f"{change.largest:.3g}{more}", relative, share_text(change.share), self.rank_text(change))
        return (row["tensor"], row["shape"], row["dtype"], *figures)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        head = ("tensor", "shape", "dtype", "max |a−b|", "‖a−b‖/‖a‖", "changed", "rank")
        rows = [head, *(self._cells(tensor) for tensor in self.differing[:SHOWN])]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        more = len(self.differing) - SHOWN
        said = [
            f"{self.first} → {self.second}",
            *self.summary(),
            *([f"the first {SHOWN} of them:"] if more > 0 else []),
        ]
        return f"<div>{'<br>'.join(map(html.escape, said))}</div><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor's name counts; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def share_text(share: float) -> str:
    """Return a share in percent that never rounds something to nothing or to everything."""
    percent = f"{share:.2%}"
    if percent == "0.00%" and share > 0:
        return "< 0.01%"
    return "> 99.99%" if percent == "100.00%" and share < 1 else percent


def _named(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {len(names)} ({', '.join(names[:3])}{more})"
