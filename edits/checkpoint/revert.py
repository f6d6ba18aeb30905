"""Take an edited checkpoint back: every byte of every file of its base, in a new folder.

What the patch did not touch comes from the edited checkpoint itself. The numbers that may have changed come from the
base that the manifest names, or from the originals in `steer/undo`; a dtype that was widened is narrowed again. Either
way each tensor must have the hash that `apply` saw before it edited, so a base that has changed since is refused. All
of that is checked before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edits.checkpoint.folder import OURS, FileTask, FolderPlan, Progress, refuse_occupied, write_folder
from edits.checkpoint.manifest import UNDO, FileRecord, Manifest, TensorRecord
from edits.checkpoint.pieces import CHUNK
from edits.checkpoint.source import SourceFile, source_files
from edits.checkpoint.stream import Bytes, read_exactly
from edits.checkpoint.write import Copied, OutTensor, Part, file_hash, parts_task, refuse_inside, region_hash
from steer.anatomy.headers import BYTES, Entry, read_file_header
from steer.errors import SteerError


@dataclass(frozen=True)
class Sources:
    """Where things are.

    Attributes:
        folder: the edited checkpoint.
        base: the base; None where the originals were kept.
    """

    folder: Path
    base: Path | None


def revert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint as it was before the patch.

    Args:
        folder: written by `apply`.
        out: a new folder; by default the folder's name with `-reverted`. Nothing is changed in place.
        base: where the base lies now, if it has moved.
        resume: finish `out.partial`; finished files are skipped, but for shards with restored tensors.
        progress: called with numbers of bytes.

    Raises:
        SteerError: no manifest; a file or tensor here is not what `apply` wrote; the base is gone or has changed and
            no originals were kept; the output exists; the disk refuses.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    target = Path(out) if out is not None else folder.resolve().with_name(folder.resolve().name + "-reverted")
    refuse_inside(target, {folder})
    refuse_occupied(target, resume)
    sources = Sources(folder, _base(manifest, base))
    if sources.base is not None:
        refuse_inside(target, {sources.base})
    files = {file.name: file for file in source_files(folder)}
    _check_files(folder, manifest, files)
    tasks = [task for record in manifest.files if (task := _task(record, files, manifest, sources)) is not None]
    times = {file.name: [file.size, file.modified] for file in files.values()}
    key = {"revert": manifest.patch, "folder": str(folder.resolve()), "files": times}
    plan = FolderPlan(tasks, key, lambda partial, records: None, partial(_whole, tasks))
    return write_folder(target, plan, resume=resume, progress=progress)


def _whole(tasks: Sequence[FileTask], unfinished: Path) -> bool:
    """Whether every file is there; each got its name when it was finished."""
    return all((path := unfinished / task.name).is_file() and path.stat().st_size == task.size for task in tasks)


def _base(manifest: Manifest, given: str | os.PathLike[str] | None) -> Path | None:
    if given is None and (manifest.undo == "kept" or not any(tensor.boxes for tensor in manifest.tensors)):
        return None
    base = Path(given or manifest.base)
    if not base.is_dir():
        raise SteerError(
            f"the base {base} is not there, and no original numbers were kept",
            "the base, or `steer apply --keep-undo`",
            "Say with --base where the base lies now",
        )
    return base


def _check_files(folder: Path, manifest: Manifest, files: Mapping[str, SourceFile]) -> None:
    """Whether what is taken from here is what was written; a card, say, may be another, since it goes."""
    for record in manifest.files:
        if record.change in ("added", "replaced"):
            continue
        found = files.get(record.name)
        if found is None or found.size != record.bytes:
            state = "is missing" if found is None else f"has {found.size} bytes"
            raise SteerError(
                f"{record.name} of {folder} {state}",
                f"the {record.bytes} bytes that `steer apply` wrote",
                "Revert an untouched copy, or take the base itself",
            )
        if record.sha256 is not None and file_hash(found.path) != record.sha256:
            raise _altered(f"{record.name} of {folder}", f"sha256:{record.sha256}")


def _altered(what: str, expected: str) -> SteerError:
    return SteerError(
        f"{what} is not what `steer apply` wrote",
        f"bytes with the hash {expected[:19]}…",
        "Revert an untouched copy, or take the base itself",
    )


def _task(record: FileRecord, files: Mapping[str, SourceFile], manifest: Manifest, sources: Sources) -> FileTask | None:
    """How to make one file of the base again; None for a file that it did not have."""
    name = record.name.removeprefix(f"{OURS}/base/")
    target = f"{OURS}/{name}" if name != record.name else name
    if record.change == "added":
        return None
    if record.change == "replaced":
        return parts_task(target, [_kept(sources.folder / UNDO / record.name)])
    file = files[record.name]
    if record.change == "kept":
        return parts_task(target, [Copied(file.path, 0, file.size)])
    held = {tensor.name: tensor for tensor in manifest.tensors if tensor.file == record.name}
    return parts_task(target, _parts(file.path, record, held, sources))


def _kept(path: Path) -> bytes:
    if not path.is_file():
        raise SteerError(f"{path} is missing", "what `steer apply` kept for the undo", "Take the base itself")
    return path.read_bytes()


def _parts(path: Path, record: FileRecord, held: Mapping[str, TensorRecord], sources: Sources) -> list[Part]:
    """Header and tensors of a shard as they were; every tensor that is made again is tried first."""
    here = read_file_header(path)
    if record.change == "rewritten":
        header = _kept(sources.folder / UNDO / f"{record.name}.header")
        before = _entries(header, record.name)
        parts: list[Part] = [header]
    else:
        before = here
        parts = [Copied(path, 0, min((entry.start for entry in here.values()), default=path.stat().st_size))]
    created = {name for name, tensor in held.items() if tensor.before is None}
    if lacking := sorted({*before, *held} - created - ({*here} & {*before})):
        raise SteerError(
            f"{path} has no tensor {lacking[0]}",
            "the tensors that `steer apply` wrote",
            "Revert an untouched copy, or take the base itself",
        )
    for name in sorted(before, key=lambda name: (before[name].start, before[name].end)):
        entry = before[name]
        if name not in held:
            parts.append(Copied(path, here[name].start, here[name].end))
            continue
        make = partial(_restored, path, here[name], entry, held[name], sources)
        _check(sources.folder, path, here[name], held[name])
        for _ in make():
            pass
        parts.append(OutTensor(name, entry.dtype, entry.shape, record.name, make=make))
    return parts


def _entries(header: bytes, file: str) -> dict[str, Entry]:
    """The tensors that a kept header describes."""
    found: dict[str, Entry] = {}
    for name, value in json.loads(header[8:]).items():
        if name != "__metadata__":
            start, end = value["data_offsets"]
            found[name] = Entry(file, value["dtype"], tuple(value["shape"]), len(header) + start, len(header) + end)
    return found


def _check(folder: Path, path: Path, entry: Entry, record: TensorRecord) -> None:
    if region_hash(path, entry.start, entry.end) != record.after:
        raise _altered(f"{record.name} of {folder}", record.after)


def _restored(path: Path, here: Entry, before: Entry, record: TensorRecord, sources: Sources) -> Iterator[Bytes]:
    """Yield the original bytes of one tensor in order.

    Raises:
        SteerError: they are not those that `apply` saw.
    """
    digest = hashlib.sha256()
    pieces = (
        _from_base(sources.base, before, record)
        if sources.base is not None and record.boxes
        else _from_here(path, here, before, record, sources.folder / UNDO / record.file)
    )
    for piece in pieces:
        digest.update(piece.data)
        yield piece
    if "sha256:" + digest.hexdigest() != record.before:
        raise _changed(record)


def _changed(record: TensorRecord) -> SteerError:
    return SteerError(
        f"the original of {record.name} has changed since the patch was applied",
        f"bytes with the hash {(record.before or '')[:19]}…",
        "Give the unchanged base with --base, or download it again",
    )


def _from_base(base: Path, before: Entry, record: TensorRecord) -> Iterator[Bytes]:
    place = read_file_header(base / record.file).get(record.name)
    if place is None or (place.dtype, place.shape) != (before.dtype, before.shape):
        raise _changed(record)
    source = os.open(base / record.file, os.O_RDONLY)
    try:
        for start in range(place.start, place.end, 4 * CHUNK):
            yield read_exactly(source, start, min(start + 4 * CHUNK, place.end))
    finally:
        os.close(source)


def _from_here(path: Path, here: Entry, before: Entry, record: TensorRecord, kept: Path) -> Iterator[Bytes]:
    """The tensor as it is here, narrowed to its old dtype, with the kept numbers laid over it."""
    experts, rows, width = record.axes
    wide, narrow = BYTES[here.dtype], BYTES[before.dtype]
    boxes = _placed(kept, record, narrow) if record.boxes else []
    source = os.open(path, os.O_RDONLY)
    undo = os.open(kept, os.O_RDONLY) if boxes else -1
    try:
        step = max(1, CHUNK // max(1, width))
        for expert in range(experts):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                first, last = ((expert * rows + row) * width * wide for row in (start, stop))
                raw = read_exactly(source, here.start + first, here.start + last)
                data = narrowed(raw, here.dtype, before.dtype).reshape(stop - start, width * narrow)
                _lay(undo, boxes, data, (expert, start, stop), narrow)
                yield data.reshape(-1)
    finally:
        os.close(source)
        if undo >= 0:
            os.close(undo)


def narrowed(data: Bytes, found: str, wanted: str) -> Bytes:
    """Return widened numbers in the dtype that they came from, exactly."""
    if found == wanted:
        return data
    if (found, wanted) == ("F32", "BF16"):
        return np.ascontiguousarray(data.view(np.uint16)[1::2]).view(np.uint8)
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    result: Bytes = data.view(kinds[found]).astype(kinds[wanted]).view(np.uint8)
    return result


def _placed(kept: Path, record: TensorRecord, size: int) -> list[tuple[Sequence[int], int]]:
    """Each box with the byte of the undo at which its numbers begin."""
    entry = read_file_header(kept).get(record.name) if kept.is_file() else None
    if entry is None:
        raise _changed(record)
    found: list[tuple[Sequence[int], int]] = []
    position = entry.start
    for box in record.boxes:
        found.append((box, position))
        position += math.prod(box[i + 1] - box[i] for i in (0, 2, 4)) * size
    if position != entry.end:
        raise _changed(record)
    return found


def _lay(
    undo: int, boxes: Sequence[tuple[Sequence[int], int]], data: Bytes, span: tuple[int, int, int], size: int
) -> None:
    expert, start, stop = span
    for (e0, e1, r0, r1, c0, c1), position in boxes:
        first, last = max(start, r0), min(stop, r1)
        if not (e0 <= expert < e1 and first < last):
            continue
        row = (c1 - c0) * size
        begin = position + ((expert - e0) * (r1 - r0) + first - r0) * row
        original = read_exactly(undo, begin, begin + (last - first) * row)
        data[first - start : last - start, c0 * size : c1 * size] = original.reshape(last - first, row)
