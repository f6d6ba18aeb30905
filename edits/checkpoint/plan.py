"""What a patch would do to a checkpoint, read from headers alone: names, shapes, dtypes, coverage, bytes."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edits.checkpoint.folder import Progress
from edits.checkpoint.source import SourceFile as SourceFile
from edits.checkpoint.source import source_files as source_files
from steer.anatomy.headers import Entry, Headers, read_headers
from steer.anatomy.record import Record, read_record
from steer.anatomy.resolve import Anatomy, resolve
from steer.errors import SteerError
from steer.identity import ModelIdentity, check_same, shape_id
from steer.patches import Matrix, Operation, Patch

if TYPE_CHECKING:
    from edits.checkpoint.apply import Edited

FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|absmax|quant_map)$|_(blocks|scales|scale_inv)$|\.quant_state\."
)
QUANTISED_REMEDY = "Patch the unquantised checkpoint and quantise the result, or use the hook form, `patch.steering()`"


@dataclass(frozen=True)
class Touched:
    """One tensor on disk that will change.

    Attributes:
        matrix: its logical name.
        name: its name on disk.
        entry: file, dtype, shape and place.
        operations: what is done to it, in order.
        head_width: columns per head.
    """

    matrix: Matrix
    name: str
    entry: Entry
    operations: tuple[Operation, ...]
    head_width: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.entry.end - self.entry.start

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads whose columns may change."""
        return tuple(
            sorted({head for operation in self.operations if operation.weight for head in operation.heads or ()})
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What `apply` would do. Prints as a table.

    Attributes:
        patch: the change.
        folder: the base checkpoint.
        anatomy: what the base calls its parts.
        touched: tensors that change, in order of layer.
        files: every file of the base.
    """

    patch: Patch
    folder: Path
    anatomy: Anatomy
    touched: tuple[Touched, ...]
    files: tuple[SourceFile, ...]

    @property
    def bytes_to_write(self) -> int:
        """Size of the output without manifest and undo."""
        return sum(file.size for file in self.files)

    @property
    def bytes_edited(self) -> int:
        """Size of the tensors that change."""
        return sum(tensor.size for tensor in self.touched)

    @property
    def coverage(self) -> str:
        """What is touched, counted against what exists."""
        heads = sum(len(tensor.heads) for tensor in self.touched)
        return f"attention output {len(self.touched)}/{self.anatomy.layers} layers, {heads}/{self.anatomy.layers * self.anatomy.heads} heads"

    @property
    def loads(self) -> dict[str, str]:
        """Where the result will load: names, shapes and dtypes stay, so wherever the base does."""
        return {
            "transformers": "yes",
            "vLLM": f"as the base (family {self.anatomy.family}), without our plugin",
            "llama.cpp": "as the base, after its converter",
        }

    def apply(
        self,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        link: bool = False,
        keep_undo: bool = False,
        progress: Progress | None = None,
    ) -> Edited:
        """Write the edited checkpoint; see `edits.checkpoint.apply.apply`."""
        from edits.checkpoint.apply import apply

        return apply(self, Path(out), resume=resume, link=link, keep_undo=keep_undo, progress=progress)

    def rows(self) -> list[tuple[str, ...]]:
        """One row per touched tensor: matrix, heads, tensor, file, dtype, shape."""
        return [
            (
                str(t.matrix),
                ", ".join(map(str, t.heads)) or "none",
                t.name,
                t.entry.file,
                t.entry.dtype,
                "x".join(map(str, t.entry.shape)),
            )
            for t in self.touched
        ]

    def summary(self) -> list[str]:
        """The plan in sentences."""
        files = len({tensor.entry.file for tensor in self.touched})
        return [
            f"{self.patch} on {self.folder}",
            self.coverage,
            f"{self.bytes_edited:,} bytes of tensors change in {files} of {len(self.files)} files; {self.bytes_to_write:,} bytes are written",
            "loads in " + "; ".join(f"{engine}: {how}" for engine, how in self.loads.items()),
        ]

    def __str__(self) -> str:
        rows = [("matrix", "heads", "tensor", "file", "dtype", "shape"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*self.summary(), *table])

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self.summary())
        head = "".join(f"<th>{word}</th>" for word in ("matrix", "heads", "tensor", "file", "dtype", "shape"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        return f"{lines}<table><tr>{head}</tr>{body}</table>"


def plan(patch: Patch, folder: str | os.PathLike[str], anatomy: str | os.PathLike[str] | Record | None = None) -> Plan:
    """Match a patch with a checkpoint on disk; reads headers, loads and writes nothing.

    Args:
        patch: what to do.
        folder: a Hugging Face checkpoint in safetensors, one file or shards, links of a hub cache too.
        anatomy: your own record, or its file, for a family that has none.

    Raises:
        SteerError: no such checkpoint; a family without a record; another model's shape; a touched tensor is missing,
            quantised, of a dtype that cannot be edited, or does not fit the operations.
    """
    folder = Path(folder)
    headers = read_headers(folder)
    found = _anatomy(headers, anatomy if anatomy is None or isinstance(anatomy, Record) else read_record(Path(anatomy)))
    check_same(patch.model, ModelIdentity(str(folder), found.family, shape_id(found.numbers())), "the patch")
    touched = tuple(_touched(matrix, operations, headers, found) for matrix, operations in patch.matrices.items())
    return Plan(patch, folder, found, touched, source_files(folder))


def _anatomy(headers: Headers, record: Record | None) -> Anatomy:
    try:
        return resolve(headers.config, headers.shapes, record)
    except SteerError as error:
        packed = [name for name in headers.tensors if _QUANTISED.search(name)]
        if not packed:
            raise
        raise SteerError(
            f"{headers.folder} is quantised: it holds {packed[0]} and {len(packed) - 1} tensors like it",
            "plain weights",
            QUANTISED_REMEDY,
        ) from error


def _touched(matrix: Matrix, operations: tuple[Operation, ...], headers: Headers, anatomy: Anatomy) -> Touched:
    if matrix.layer >= anatomy.layers:
        raise SteerError(
            f"the patch names {matrix}", f"layers 0 to {anatomy.layers - 1}", "Give a patch made for this model"
        )
    name = anatomy.disk_name(matrix.module, matrix.layer)
    _refuse_quantised(matrix, name, headers.tensors)
    if name not in headers.tensors:
        raise SteerError(
            f"{headers.folder} has no tensor {name} for {matrix}",
            "every tensor that the patch names",
            "Check that the checkpoint is complete",
        )
    entry = headers.tensors[name]
    if entry.dtype not in FLOATS or len(entry.shape) != 2:
        raise SteerError(
            f"{name} has dtype {entry.dtype} and shape {list(entry.shape)}",
            f"a matrix of {', '.join(FLOATS)}",
            QUANTISED_REMEDY,
        )
    rows, columns = entry.shape
    if columns % anatomy.heads:
        raise SteerError(
            f"{name} has {columns} columns for {anatomy.heads} heads", "a whole number of columns per head"
        )
    for operation in operations:
        operation.check((rows, columns), anatomy.heads)
    return Touched(matrix, name, entry, operations, columns // anatomy.heads)


def _refuse_quantised(matrix: Matrix, name: str, tensors: Mapping[str, Entry]) -> None:
    stem = name.removesuffix(".weight")
    packed = [other for other in tensors if other.startswith((stem + ".", stem + "_")) and _QUANTISED.search(other)]
    if packed:
        raise SteerError(f"{matrix} is quantised on disk ({packed[0]})", "a plain weight", QUANTISED_REMEDY)
