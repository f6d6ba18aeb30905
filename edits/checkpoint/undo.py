"""Take an edited checkpoint back: every byte of every file of its base, in a new folder.

What the patch did not touch comes from the edited checkpoint itself. The touched tensors come from the base that
the manifest names, or from the original columns kept in `steer/undo`; either way each one must have the hash that
`apply` saw before it edited, so a base that has changed since is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from edits.checkpoint.apply import byte_columns, hash_of
from edits.checkpoint.folder import OURS, FileTask, FolderPlan, Progress, write_folder
from edits.checkpoint.manifest import UNDO, Manifest, TensorRecord
from edits.checkpoint.plan import SourceFile, source_files
from edits.checkpoint.stream import Bytes, Json, Splice, read_exactly, splice
from steer.anatomy.headers import Entry, read_file_header
from steer.errors import SteerError

Restore = Callable[[Entry, TensorRecord, Bytes], None]


def revert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint as it was before the patch.

    Args:
        folder: written by `apply`.
        out: a new folder; by default the folder's name with `-reverted`. Nothing is changed in place.
        base: where the base lies now, if it has moved.
        progress: called with numbers of bytes.

    Raises:
        SteerError: no manifest; a file or tensor here is not what `apply` wrote; the base is gone or has changed and
            no original columns were kept; the output exists; the disk refuses.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    files = {file.name: file for file in source_files(folder)}
    _check_files(folder, manifest, files)
    restore = (
        _from_slices(folder)
        if manifest.undo == "slices" and base is None
        else _from_base(Path(base or manifest.base), manifest)
    )
    for record in manifest.tensors:
        place = read_file_header(files[record.file].path)[record.name]
        _rewrite(folder, record, place, restore)(_read(files[record.file].path, place))
    tasks = [
        _task(folder, files[record.name], [t for t in manifest.tensors if t.file == record.name], restore)
        for record in manifest.files
    ]
    key: Json = {"revert": manifest.patch, "folder": str(folder.resolve())}
    target = Path(out) if out is not None else folder.resolve().with_name(folder.resolve().name + "-reverted")
    if target.resolve().is_relative_to(folder.resolve()):
        raise SteerError(
            f"the output {target} lies inside {folder}",
            "a folder outside of it",
            "A checkpoint is never changed in place",
        )
    return write_folder(
        target, FolderPlan(tasks, key, lambda partial, records: None, lambda partial: False), progress=progress
    )


def _check_files(folder: Path, manifest: Manifest, files: Mapping[str, SourceFile]) -> None:
    for record in manifest.files:
        found = files.get(record.name)
        if found is None or found.size != record.bytes:
            state = "is missing" if found is None else f"has {found.size} bytes"
            raise SteerError(
                f"{record.name} of {folder} {state}",
                f"the {record.bytes} bytes that `steer apply` wrote",
                "Revert an untouched copy, or take the base itself",
            )


def _task(folder: Path, file: SourceFile, records: list[TensorRecord], restore: Restore) -> FileTask:
    header = read_file_header(file.path) if records else {}
    name = file.name.removeprefix(f"{OURS}/base/")
    target = f"{OURS}/{name}" if name != file.name else name

    def write(descriptor: int, progress: Progress) -> Json:
        source = os.open(file.path, os.O_RDONLY)
        try:
            parts = [
                Splice(header[r.name].start, header[r.name].end, _rewrite(folder, r, header[r.name], restore))
                for r in records
            ]
            splice(source, descriptor, file.size, parts, progress)
            return {}
        finally:
            os.close(source)

    return FileTask(target, file.size, write, lambda path, record: False)


def _rewrite(folder: Path, record: TensorRecord, entry: Entry, restore: Restore) -> Callable[[Bytes], Json]:
    def rewrite(data: Bytes) -> Json:
        if hash_of(data) != record.after:
            raise SteerError(
                f"{record.name} of {folder} is not what `steer apply` wrote",
                f"bytes with the hash {record.after[:19]}…",
                "Revert an untouched copy, or take the base itself",
            )
        restore(entry, record, data)
        if hash_of(data) != record.before:
            raise _changed(record)
        return {}

    return rewrite


def _changed(record: TensorRecord) -> SteerError:
    return SteerError(
        f"the original of {record.name} has changed since the patch was applied",
        f"bytes with the hash {record.before[:19]}…",
        "Give the unchanged base with --base, or download it again",
    )


def _from_base(base: Path, manifest: Manifest) -> Restore:
    if not base.is_dir():
        raise SteerError(
            f"the base {base} is not there, and no original columns were kept",
            "the base, or `steer apply --keep-undo`",
            "Say with --base where the base lies now",
        )
    headers = {file: read_file_header(base / file) for file in {tensor.file for tensor in manifest.tensors}}
    for record in manifest.tensors:
        if record.name not in headers[record.file]:
            raise _changed(record)

    def restore(entry: Entry, record: TensorRecord, data: Bytes) -> None:
        place = headers[record.file][record.name]
        if (place.dtype, place.shape) != (entry.dtype, entry.shape):
            raise _changed(record)
        data[:] = _read(base / record.file, place)

    return restore


def _from_slices(folder: Path) -> Restore:
    def restore(entry: Entry, record: TensorRecord, data: Bytes) -> None:
        path = folder / UNDO / record.file
        kept = _read(path, read_file_header(path)[record.name])
        rows = entry.shape[0]
        data.reshape(rows, -1)[:, byte_columns(record.columns, entry)] = kept.reshape(rows, -1)

    return restore


def _read(path: Path, entry: Entry) -> Bytes:
    source = os.open(path, os.O_RDONLY)
    try:
        return read_exactly(source, entry.start, entry.end)
    finally:
        os.close(source)
