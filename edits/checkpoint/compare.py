"""Whether two checkpoints hold the same tensors, byte by byte, each under the patches that are laid on it.

A patch is carried out on one tensor at a time with the function that `apply` uses; everything else is read in steps.
So a model of any size is compared in the memory of one tensor, and nothing is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from edits.checkpoint.apply import TORCH
from edits.checkpoint.plan import Touched, plan
from edits.checkpoint.stream import Bytes, read_exactly
from steer.anatomy.headers import Entry, Headers, read_headers
from steer.anatomy.record import Record
from steer.errors import SteerError
from steer.operations import edit_
from steer.patches import Patch
from steer.sources import locate
from steer.subjects import load_change, parse

STEP = 1 << 24


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint, and the patches laid on it in order.

    Attributes:
        folder: of the checkpoint.
        patches: each with its scale.
        anatomy: your own record, where the family has none.
    """

    folder: Path
    patches: tuple[tuple[Patch, float], ...] = ()
    anatomy: Record | None = None

    def touched(self) -> dict[str, Touched]:
        """Tensors that the patches change, by name on disk; overlapping patches become one list of operations."""
        if not self.patches:
            return {}
        scaled = [patch.scaled(scale) for patch, scale in self.patches]
        for patch in scaled:
            plan(patch, self.folder, self.anatomy)
        together = Patch(tuple(operation for patch in scaled for operation in patch.operations))
        return {tensor.name: tensor for tensor in plan(together, self.folder, self.anatomy).touched}

    def __str__(self) -> str:
        words = (
            f"patch {patch.fingerprint[:8]}" + (f" x {scale}" if scale != 1 else "") for patch, scale in self.patches
        )
        return " + ".join([str(self.folder), *words])


def on_disk(subject: OnDisk | str | os.PathLike[str]) -> OnDisk:
    """Find the tensors of a subject without loading its model.

    Args:
        subject: a folder, or the text of a subject, `MODEL[+FILE[@COEFFICIENT]]...`; a steering stands for its patch.

    Raises:
        SteerError: the text, the model or a file cannot be read; vLLM is asked for; a steering has no patch form.
    """
    if isinstance(subject, OnDisk):
        return subject
    text = str(os.fspath(subject))
    if not isinstance(subject, str) or Path(text).is_dir():
        return OnDisk(Path(text))
    parsed = parse(text)
    if parsed.backend != "hf":
        raise SteerError(f"{text!r} asks for vLLM", "a subject without vllm:", "Its weights are the checkpoint's own")
    folder = locate(parsed.model).folder
    changes = [(load_change(path, parsed.model), scale) for path, scale in parsed.changes]
    patches = [(each if isinstance(each, Patch) else Patch.from_steering(each, folder), c) for each, c in changes]
    return OnDisk(folder, tuple(patches))


@dataclass(frozen=True)
class SameBytes:
    """What a comparison found.

    Attributes:
        tensors: how many were compared.
        patched: how many of them a patch touches on either side.
        differing: names of those that differ, or that only one side has.
    """

    tensors: int
    patched: int
    differing: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing


def same_bytes(first: OnDisk, second: OnDisk) -> SameBytes:
    """Compare every tensor of two checkpoints.

    Raises:
        SteerError: a folder holds no checkpoint, or a patch does not fit it.
    """
    a, b = read_headers(first.folder), read_headers(second.folder)
    edits_a, edits_b = first.touched(), second.touched()
    names = sorted({*a.tensors, *b.tensors})
    differing = [name for name in names if not _same(name, a, b, edits_a.get(name), edits_b.get(name))]
    return SameBytes(len(names), len({*edits_a, *edits_b}), tuple(differing))


def _same(name: str, a: Headers, b: Headers, edit_a: Touched | None, edit_b: Touched | None) -> bool:
    x, y = a.tensors.get(name), b.tensors.get(name)
    if x is None or y is None or (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    with _open(a.folder / x.file) as left, _open(b.folder / y.file) as right:
        if edit_a is None and edit_b is None:
            return _same_ranges(left, right, x, y)
        return bool((patched(left, x, edit_a) == patched(right, y, edit_b)).all())


@contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _same_ranges(left: int, right: int, x: Entry, y: Entry) -> bool:
    if x.start == y.start and os.path.sameopenfile(left, right):
        return True
    size = x.end - x.start
    for offset in range(0, size, STEP):
        stop = min(offset + STEP, size)
        same = read_exactly(left, x.start + offset, x.start + stop) == read_exactly(
            right, y.start + offset, y.start + stop
        )
        if not same.all():
            return False
    return True


def patched(source: int, entry: Entry, edit: Touched | None) -> Bytes:
    """Return the bytes of one tensor of an open file after the operations that touch it."""
    data = read_exactly(source, entry.start, entry.end)
    if edit is not None:
        edit_(torch.from_numpy(data).view(TORCH[entry.dtype]).view(entry.shape), edit.operations, edit.head_width)
    return data
