"""Prove an edit without loading a model: an edited checkpoint is its base under its patch, tensor by tensor.

A touched tensor must have the hash that the manifest states, be what the edit makes of the base's tensor byte for
byte, and, where it was projected, hold no more of the direction than the formula leaves (`edits.checkpoint.residue`,
which shares no code with the edit). Everything else must be the base's: the same file, or equal when read; where the
base is not at hand, by the hash that was recorded, and where none was, by its size. How often each way of knowing
was used is counted. Memory holds one touched tensor three times.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from edits.checkpoint.apply import TORCH, hash_of
from edits.checkpoint.compare import OnDisk, patched
from edits.checkpoint.folder import JOURNAL, OURS
from edits.checkpoint.manifest import MANIFEST, PATCH, FileRecord, Manifest, TensorRecord
from edits.checkpoint.plan import Touched
from edits.checkpoint.residue import Residue, residues
from edits.checkpoint.stream import Bytes, read_exactly
from edits.proof import HASH, READ, SAME_FILE, SIZE, Problem, Proof, TouchedTensor
from steer.anatomy.headers import Entry, Headers, read_headers
from steer.anatomy.record import Record
from steer.errors import SteerError
from steer.operations import ProjectColumns
from steer.patches import Patch

STEP = 1 << 24
Progress = Callable[[int, int], None]


def prove(
    edited: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    read: bool = True,
    anatomy: Record | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Check that an edited checkpoint is its base under the patch that its manifest names.

    Args:
        edited: a folder written by `apply`.
        base: where the base lies now; by default where the manifest says, and without it if nothing is there.
        read: compare what the patch does not touch byte by byte; False looks at its size only.
        anatomy: your own record, where the family has none.
        progress: called with the number of tensors that are done, and of all.

    Raises:
        SteerError: no manifest, a header or shard that is damaged, or a `base` that is no checkpoint.
    """
    folder = Path(edited)
    if not (folder / MANIFEST).is_file() and (folder / JOURNAL).is_file():
        raise SteerError(
            f"{folder} is not finished: it holds the journal of a run that was interrupted",
            "a checkpoint that `steer apply` has finished",
            "Finish it with the same command and --resume",
        )
    manifest, patch = Manifest.read(folder), Patch.load(folder / PATCH)
    where = Path(base) if base is not None else Path(manifest.base)
    original = read_headers(where) if base is not None or (where / "config.json").is_file() else None
    case = _Case(folder, manifest, read_headers(folder), original, read)
    if patch.fingerprint != manifest.patch:
        case.wrong(PATCH, f"is not the patch {manifest.patch[:12]} that the manifest names")
    case.check_files()
    plans = {} if original is None else OnDisk(where, ((patch, 1.0),), anatomy).touched()
    known = {record.name: record for record in manifest.tensors}
    touched: list[TouchedTensor] = []
    tell = progress or (lambda done, total: None)
    for name in sorted(set(plans) - set(known)):
        case.wrong(name, "is touched by the patch, and the manifest does not say so")
    names = sorted({*known, *case.headers.tensors, *(original.tensors if original else ())})
    for done, name in enumerate(names, 1):
        if name in known:
            touched += case.check_touched(known[name], plans.get(name))
        else:
            case.check_untouched(name)
        tell(done, len(names))
    return Proof(
        str(folder),
        None if original is None else str(where),
        manifest.patch,
        tuple(touched),
        dict(case.untouched),
        dict(case.files),
        tuple(case.problems),
    )


@dataclass
class _Case:
    """What is known so far of one edited checkpoint."""

    folder: Path
    manifest: Manifest
    headers: Headers
    base: Headers | None
    read: bool
    problems: list[Problem] = field(default_factory=list)
    untouched: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    _hashed: dict[str, bool] = field(default_factory=dict)

    def wrong(self, name: str, found: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(name, found))

    def check_files(self) -> None:
        """Sizes of all files; contents of those without tensors."""
        for record in self.manifest.files:
            path = self.folder / record.name
            if not path.is_file():
                self.wrong(record.name, "is missing")
            elif path.stat().st_size != record.bytes:
                self.wrong(record.name, f"has {path.stat().st_size} bytes, not the {record.bytes} that were written")
            elif record.name not in self.headers.files:
                self._check_other(record, path)

    def _check_other(self, record: FileRecord, path: Path) -> None:
        original = None if self.base is None else Path(self.base.folder) / _source_name(record.name)
        if original is not None and not original.is_file():
            self.wrong(record.name, "is not in the base")
            return
        if original is not None and original.samefile(path):
            self.files[SAME_FILE] += 1
        elif original is not None and self.read:
            if not _same_bytes(original, path, 0, 0, record.bytes, original.stat().st_size):
                self.wrong(record.name, "is not the base's")
            self.files[READ] += 1
        else:
            self.files[self._by_record(record)] += 1

    def check_touched(self, record: TensorRecord, plan: Touched | None) -> Iterator[TouchedTensor]:
        """Hash, recomputation and residue of one tensor; nothing where it is missing."""
        entry = self.headers.tensors.get(record.name)
        if entry is None:
            self.wrong(record.name, "is missing, and the manifest says that it was edited")
            return
        stored = _read(self.folder, entry)
        as_written = hash_of(stored) == record.after
        if not as_written:
            unedited = hash_of(stored) == record.before
            self.wrong(
                record.name,
                "holds the bytes of the base: it was not edited"
                if unedited
                else "is not what was written: its hash differs",
            )
        recomputed: bool | None = None
        left: tuple[Residue, ...] = ()
        if self.base is not None and plan is not None:
            original = _read(Path(self.base.folder), plan.entry)
            if hash_of(original) != record.before:
                self.wrong(record.name, "was edited from other bytes than the base has now")
            else:
                recomputed = _edited(Path(self.base.folder), plan, stored)
                if not recomputed:
                    self.wrong(record.name, "is not what the patch makes of the base")
                left = tuple(_residues(plan, original, stored))
                for residue in (each for each in left if not each.passed):
                    self.wrong(
                        record.name,
                        f"has a component along its direction that is {residue.gap:.3g} off the formula, more than {residue.tolerance:.3g}",
                    )
        yield TouchedTensor(record.name, as_written, recomputed, left)

    def check_untouched(self, name: str) -> None:
        """One tensor that the patch leaves alone."""
        entry = self.headers.tensors.get(name)
        if entry is None:
            self.wrong(name, "is missing")
            return
        record = next((each for each in self.manifest.files if each.name == entry.file), None)
        if record is None:
            self.wrong(name, f"lies in {entry.file}, which the manifest does not know")
            return
        if self.base is None:
            self.untouched[SIZE if record.touched else self._by_record(record)] += 1
            return
        other = self.base.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
            state = "is not in the base" if other is None else f"is {other.dtype} {list(other.shape)} in the base"
            self.wrong(name, state)
            return
        a, b = Path(self.base.folder) / other.file, self.folder / entry.file
        if other.start == entry.start and a.samefile(b):
            self.untouched[SAME_FILE] += 1
        elif self.read:
            size = entry.end - entry.start
            if not _same_bytes(a, b, other.start, entry.start, size, other.end - other.start):
                self.wrong(name, "differs from the base, and the patch does not touch it")
            self.untouched[READ] += 1
        else:
            self.untouched[SIZE] += 1

    def _by_record(self, record: FileRecord) -> str:
        """Hash an untouched file where a hash was recorded and reading is wanted; say how the file is known."""
        if not self.read or record.base_hash is None:
            return SIZE
        if record.name not in self._hashed:
            self._hashed[record.name] = _has_hash(self.folder / record.name, record.base_hash)
            if not self._hashed[record.name]:
                self.wrong(record.name, f"does not have the hash {record.base_hash[:19]}… that was recorded")
        return HASH


def _source_name(name: str) -> str:
    """Name in the base of a file that `apply` carried over."""
    moved = f"{OURS}/base/"
    return f"{OURS}/{name.removeprefix(moved)}" if name.startswith(moved) else name


def _read(folder: Path, entry: Entry) -> Bytes:
    descriptor = os.open(folder / entry.file, os.O_RDONLY)
    try:
        return read_exactly(descriptor, entry.start, entry.end)
    finally:
        os.close(descriptor)


def _edited(base: Path, plan: Touched, stored: Bytes) -> bool:
    descriptor = os.open(base / plan.entry.file, os.O_RDONLY)
    try:
        return bool((patched(descriptor, plan.entry, plan) == stored).all())
    finally:
        os.close(descriptor)


def _residues(plan: Touched, original: Bytes, stored: Bytes) -> list[Residue]:
    projections = [operation for operation in plan.operations if isinstance(operation, ProjectColumns)]
    if len(projections) < len(plan.operations):
        return []
    before, after = (
        torch.from_numpy(data).view(TORCH[plan.entry.dtype]).view(plan.entry.shape) for data in (original, stored)
    )
    return residues(before, after, projections, plan.head_width)


def _same_bytes(a: Path, b: Path, first: int, second: int, size: int, other: int) -> bool:
    if size != other:
        return False
    left, right = os.open(a, os.O_RDONLY), os.open(b, os.O_RDONLY)
    try:
        bounds = [(start, min(start + STEP, size)) for start in range(0, size, STEP)]
        return all(
            (read_exactly(left, first + x, first + y) == read_exactly(right, second + x, second + y)).all()
            for x, y in bounds
        )
    finally:
        os.close(left)
        os.close(right)


def _has_hash(path: Path, expected: str) -> bool:
    """Compare with `sha256:…` of the bytes, or with `git-sha1:…`, which git makes of a length and the bytes."""
    kind, _, digest = expected.partition(":")
    state = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(STEP):
            state.update(block)
    return state.hexdigest() == digest
