"""What `edits.prove` found: whether an edited checkpoint is its base under its patch, and how that is known."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edits.checkpoint.residue import Residue
from steer.tables import table

if TYPE_CHECKING:
    import pandas

SAME_FILE, READ, HASH, SIZE, REMADE = "same_file", "read", "hash", "size", "remade"
WAYS = {
    SAME_FILE: "the same file",
    READ: "equal to the base byte for byte",
    HASH: "by the hash that was recorded",
    REMADE: "the base's with the keys set that the manifest names",
    SIZE: "by size only",
}
SHOWN = 20
COLUMNS = (
    "tensor", "matrix", "as_written", "recomputed", "weight", "before", "after", "wanted", "gap", "tolerance",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: the tensor or file, and what was found."""

    name: str
    found: str

    def __str__(self) -> str:
        return f"{self.name} {self.found}"


@dataclass(frozen=True)
class TouchedTensor:
    """What is known of one tensor that the patch touches.

    Attributes:
        name: on disk.
        as_written: whether its bytes have the hash that the manifest states.
        recomputed: whether the edit of the base's tensor gives the same bytes; None where base or patch are not at hand.
        residues: of its projections; empty for other operations and where the base is not at hand.
    """

    name: str
    as_written: bool
    recomputed: bool | None
    residues: tuple[Residue, ...] = ()


@dataclass(frozen=True)
class Proof:
    """Whether an edited checkpoint is its base under its patch. Prints as a report.

    Attributes:
        edited: the checkpoint.
        base: the folder that it was compared with; None where it was not at hand.
        patch: fingerprint of the patch.
        touched: tensors that the patch changes.
        untouched: how many other tensors are known in which way (keys of `WAYS`).
        files: the same for files without tensors.
        forced: how many matrices were edited although they were not those that the patch was made for.
        described: the patch was described instead of stored, since it read its numbers from other checkpoints; its
            tensors are known by their hash alone.
        problems: what is wrong, by name; none means that the proof holds.
    """

    edited: str
    base: str | None
    patch: str
    touched: tuple[TouchedTensor, ...] = field(repr=False)
    untouched: Mapping[str, int]
    files: Mapping[str, int]
    forced: int = 0
    described: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def rows(self) -> list[dict[str, Any]]:
        """One row per projection; one per touched tensor that has none."""
        found = []
        for tensor in self.touched:
            known = {"tensor": tensor.name, "as_written": tensor.as_written, "recomputed": tensor.recomputed}
            found += [known | _figures(residue) for residue in tensor.residues] or [known]
        return [{name: row.get(name) for name in COLUMNS} for row in found]

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas table.

        Raises:
            SteerError: pandas is not installed.
        """
        return table(self.rows(), COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "edited": self.edited,
            "base": self.base,
            "patch": self.patch,
            "passed": self.passed,
            "touched": self.rows(),
            "untouched": dict(self.untouched),
            "files": dict(self.files),
            "forced": self.forced,
            "described": self.described,
            "problems": [{"name": problem.name, "found": problem.found} for problem in self.problems],
        }

    def summary(self) -> list[tuple[str, str]]:
        """The proof as label and text."""
        written = sum(tensor.as_written for tensor in self.touched)
        made = sum(tensor.recomputed is True for tensor in self.touched)
        again = f"{made} recomputed byte for byte"
        if self.base is None or self.described:
            again = f"not recomputed without {'the base' if self.base is None else 'the numbers of the patch'}"
        rows = [("edited", self.edited), ("base", self.base or "not at hand"), ("patch", self.patch[:12])]
        rows.append(("touched tensors", f"{len(self.touched)}: {written} as written, {again}"))
        residues = [residue for tensor in self.touched for residue in tensor.residues]
        if residues:
            worst = max(residues, key=lambda residue: residue.gap / residue.tolerance if residue.tolerance else 0.0)
            where = f"{worst.before:.3g} -> {worst.after:.3g} in {worst.matrix}"
            kept = f"within {worst.gap:.2g} of the formula, tolerance {worst.tolerance:.2g}"
            rows.append(
                (
                    "component left",
                    f"max |v̂ᵀW| of {len(residues)} projections; nearest to its tolerance {where}, {kept}",
                )
            )
        rows.append(("untouched tensors", _ways(self.untouched)))
        rows.append(("other files", _ways(self.files)))
        if self.forced:
            rows.append(("forced", f"{self.forced} matrices were not those that the patch was made for"))
        rows += [("wrong", str(problem)) for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            rows.append(("wrong", f"and {len(self.problems) - SHOWN} more"))
        return [*rows, ("verdict", "proved" if self.passed else "NOT PROVED")]

    def __str__(self) -> str:
        rows = self.summary()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label.ljust(width)}  {text}" for label, text in rows)

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>" for label, text in self.summary()
        )
        return f"<table>{''.join(cells)}</table>"


def _figures(residue: Residue) -> dict[str, Any]:
    names = ("weight", "before", "after", "wanted", "gap", "tolerance")
    return {"matrix": str(residue.matrix)} | {name: getattr(residue, name) for name in names}


def _ways(counts: Mapping[str, int]) -> str:
    parts = [f"{counts[way]} {text}" for way, text in WAYS.items() if counts.get(way)]
    return f"{sum(counts.values())}: {', '.join(parts)}" if parts else "none"
