"""Write an edited checkpoint: an ordinary Hugging Face folder with every file of its base.

Shards that hold a touched tensor are written in one pass, everything else by kernel copy or, on request, as hard
links. Each touched tensor is hashed before and after, and the manifest says how much of the wanted change survived
the cast to the checkpoint's dtype.
"""

from __future__ import annotations

import hashlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edits.checkpoint.folder import FileTask, FolderPlan, Progress, refuse_occupied, write_folder
from edits.checkpoint.manifest import MANIFEST, PATCH, UNDO, FileRecord, Manifest, TensorRecord
from edits.checkpoint.plan import FLOATS, Plan, SourceFile, Touched
from edits.checkpoint.stream import Bytes, Json, Splice, read_exactly, safetensors_header, splice, write_all
from steer.anatomy.headers import Entry
from steer.errors import SteerError
from steer.identity import shape_id
from steer.operations import edit_
from steer.patches import Patch

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Edited(os.PathLike[str]):
    """An edited checkpoint on disk; usable wherever a path is.

    Attributes:
        path: the folder.
        manifest: what was done.
    """

    path: Path
    manifest: Manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def survived(self) -> float | None:
        """Smallest share of the wanted change that survived the cast, over all touched tensors."""
        shares = [tensor.survived for tensor in self.manifest.tensors if tensor.survived is not None]
        return min(shares, default=None)

    def __str__(self) -> str:
        """Return the path, since libraries write `str(path)` where they mean a path."""
        return str(self.path)

    def summary(self) -> str:
        """Say in one line what was done."""
        share = (
            "" if self.survived is None else f"; at least {self.survived:.4f} of the wanted change survived the cast"
        )
        return f"{self.path}: {self.manifest.coverage}{share}; undo from {self.manifest.undo}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(t.matrix)}</td><td>{html.escape(t.name)}</td><td>{_number(t.survived)}</td><td>{_number(t.cosine)}</td></tr>"
            for t in self.manifest.tensors
        )
        return f"<div>{html.escape(self.summary())}</div><table><tr><th>matrix</th><th>tensor</th><th>survived</th><th>cosine</th></tr>{rows}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def apply(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    link: bool = False,
    keep_undo: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Write the checkpoint that a plan describes.

    Args:
        plan: from `patch.plan(folder)`.
        out: a new folder, outside the base.
        resume: finish `out.partial`; finished files are checked and skipped, the result has the same bytes.
        link: share untouched files with the base by hard links where the file system can.
        keep_undo: store the original columns, so that `revert` needs no base.
        progress: called with numbers of bytes as they are done.

    Raises:
        SteerError: the output exists or lies inside the base; the base is not what the patch expects; a partial folder
            is in the way or was begun with something else; the disk refuses.
    """
    base = plan.folder.resolve()
    if out.resolve().is_relative_to(base):
        raise SteerError(
            f"the output {out} lies inside the base {plan.folder}",
            "a folder outside of it",
            "A checkpoint is never changed in place",
        )
    refuse_occupied(out, resume)
    check_expectations(plan)
    touched = _by_file(plan.touched)
    tasks = [task for file in plan.files for task in _tasks(file, touched.get(file.name, []), link, keep_undo)]
    key = {
        "patch": plan.patch.fingerprint,
        "base": str(base),
        "files": {file.name: [file.size, file.modified] for file in plan.files},
        "undo": "slices" if keep_undo else "base",
    }

    def seal(unfinished: Path, records: Mapping[str, Json]) -> None:
        plan.patch.save(unfinished / PATCH, overwrite=True)
        _manifest(plan, base, records, str(key["undo"])).write(unfinished)

    def sealed(unfinished: Path) -> bool:
        if not (unfinished / MANIFEST).exists():
            return False
        found = Manifest.read(unfinished)
        return (found.patch, found.base, found.undo) == (key["patch"], key["base"], key["undo"])

    path = write_folder(out, FolderPlan(tasks, key, seal, sealed), resume=resume, progress=progress)
    return Edited(path, Manifest.read(path))


def pin(plan: Plan) -> Patch:
    """Return the plan's patch with the hashes of the tensors that it touches, so that it fits this base alone."""
    return replace(plan.patch, expects={tensor.matrix: hash_on_disk(plan.folder, tensor) for tensor in plan.touched})


def check_expectations(plan: Plan) -> None:
    """Refuse a base whose touched tensors are not those that the patch was made for, before anything is written.

    Raises:
        SteerError: a hash differs.
    """
    for tensor in plan.touched:
        expected = plan.patch.expects.get(tensor.matrix)
        if expected is not None and (found := hash_on_disk(plan.folder, tensor)) != expected:
            raise SteerError(
                f"{tensor.name} of {plan.folder} has the hash {found[:19]}…",
                f"{expected[:19]}…, which the patch was made for",
                "Apply it to the model it was made on, or make it again",
            )


def hash_on_disk(folder: Path, tensor: Touched) -> str:
    """Return the hash of a tensor's bytes."""
    source = os.open(folder / tensor.entry.file, os.O_RDONLY)
    try:
        return hash_of(read_exactly(source, tensor.entry.start, tensor.entry.end))
    finally:
        os.close(source)


def hash_of(data: Bytes) -> str:
    """Return `sha256:…` of some bytes, as `steer.operations.tensor_hash` says it of a tensor."""
    return "sha256:" + hashlib.sha256(data.data).hexdigest()


def _by_file(touched: Iterable[Touched]) -> dict[str, list[Touched]]:
    found: dict[str, list[Touched]] = {}
    for tensor in touched:
        found.setdefault(tensor.entry.file, []).append(tensor)
    return found


def _tasks(file: SourceFile, touched: list[Touched], link: bool, keep_undo: bool) -> Iterable[FileTask]:
    if touched and keep_undo:
        yield _undo_task(file, touched)
    shared = file.path if link and not touched else None
    yield FileTask(
        file.target,
        file.size,
        lambda target, progress: _write(file, touched, target, progress),
        lambda path, record: _intact(path, touched, record),
        shared,
    )


def _write(file: SourceFile, touched: list[Touched], target: int, progress: Progress) -> Json:
    source = os.open(file.path, os.O_RDONLY)
    try:
        parts = [Splice(tensor.entry.start, tensor.entry.end, partial(_edit, tensor)) for tensor in touched]
        return {"tensors": {record["name"]: record for record in splice(source, target, file.size, parts, progress)}}
    finally:
        os.close(source)


def _edit(tensor: Touched, data: Bytes) -> Json:
    """Edit the bytes of one tensor in place, and say what happened."""
    before = hash_of(data)
    weight = torch.from_numpy(data).view(TORCH[tensor.entry.dtype]).view(tensor.entry.shape)
    survival = edit_(weight, tensor.operations, tensor.head_width)
    return {
        "name": tensor.name,
        "file": tensor.entry.file,
        "matrix": str(tensor.matrix),
        "before": before,
        "after": hash_of(data),
        "wanted": survival.wanted,
        "survived": survival.share,
        "cosine": survival.cosine,
        "columns": columns_of(tensor),
    }


def _intact(path: Path, touched: list[Touched], record: Json) -> bool:
    return all(hash_on_disk(path.parent, tensor) == record["tensors"][tensor.name]["after"] for tensor in touched)


def _undo_task(file: SourceFile, touched: list[Touched]) -> FileTask:
    """Keep the original columns of one shard's touched tensors, as a safetensors file of their own."""
    entries = {
        tensor.name: (
            tensor.entry.dtype,
            (tensor.entry.shape[0], len(tensor.heads) * tensor.head_width),
            _undo_bytes(tensor),
        )
        for tensor in touched
    }
    header = safetensors_header(entries)

    def write(target: int, progress: Progress) -> Json:
        source, position, digest = os.open(file.path, os.O_RDONLY), len(header), hashlib.sha256(header)
        try:
            write_all(target, header, 0)
            for tensor in touched:
                data = read_exactly(source, tensor.entry.start, tensor.entry.end).reshape(tensor.entry.shape[0], -1)
                kept = np.ascontiguousarray(data[:, byte_columns(columns_of(tensor), tensor.entry)]).reshape(-1)
                write_all(target, kept, position)
                digest.update(kept.data)
                position += kept.nbytes
        finally:
            os.close(source)
        progress(position)
        return {"sha256": digest.hexdigest()}

    def intact(path: Path, record: Json) -> bool:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == str(record["sha256"])

    return FileTask(f"{UNDO}/{file.name}", len(header) + sum(map(_undo_bytes, touched)), write, intact)


def columns_of(tensor: Touched) -> list[list[int]]:
    """Return the half-open ranges of columns that may change, in order."""
    return [[head * tensor.head_width, (head + 1) * tensor.head_width] for head in tensor.heads]


def byte_columns(columns: Iterable[Sequence[int]], entry: Entry) -> NDArray[np.intp]:
    """Return which bytes of a row belong to some ranges of columns."""
    width = FLOATS[entry.dtype]
    return np.concatenate(
        [np.arange(start * width, end * width) for start, end in columns] or [np.empty(0, dtype=np.intp)]
    )


def _undo_bytes(tensor: Touched) -> int:
    return tensor.entry.shape[0] * len(tensor.heads) * tensor.head_width * FLOATS[tensor.entry.dtype]


def _manifest(plan: Plan, base: Path, records: Mapping[str, Json], undo: str) -> Manifest:
    tensors = [TensorRecord(**records[tensor.entry.file]["tensors"][tensor.name]) for tensor in plan.touched]
    touched = {tensor.file for tensor in tensors}
    return Manifest(
        base=str(base),
        family=plan.anatomy.family,
        shape_id=shape_id(plan.anatomy.numbers()),
        patch=plan.patch.fingerprint,
        coverage=plan.coverage,
        undo=undo,
        tensors=tuple(tensors),
        files=tuple(FileRecord(file.target, file.size, file.name in touched, file.known_hash) for file in plan.files),
    )
