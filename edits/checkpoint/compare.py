"""Whether two checkpoints hold the same tensors, byte by byte, each under the patches that are laid on it.

A patch is carried out piece by piece with the function that `apply` uses; everything else is read in steps. So a model
of any size is compared in the memory of a few pieces, and nothing is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edits.checkpoint.pieces import edited_bytes
from edits.checkpoint.plan import Plan, plan
from edits.checkpoint.stream import Bytes, read_exactly
from edits.checkpoint.touched import Touched
from steer.anatomy.headers import Entry, Headers, read_headers
from steer.anatomy.record import Record
from steer.errors import SteerError
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

    def plan(self) -> Plan | None:
        """What the patches together do, each checked by itself first; None where there are none.

        Raises:
            SteerError: a patch does not fit.
        """
        scaled = [replace(patch.scaled(scale), expects={}) for patch, scale in self.patches]
        plans = [plan(patch, self.folder, self.anatomy) for patch in scaled]
        return plan(scaled, self.folder, self.anatomy) if len(plans) > 1 else next(iter(plans), None)

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
    a, b = _State.of(first), _State.of(second)
    names = sorted({*a.headers.tensors, *b.headers.tensors, *a.touched, *b.touched})
    differing = [name for name in names if not _same(name, a, b)]
    return SameBytes(len(names), len({*a.touched, *b.touched}), tuple(differing))


@dataclass(frozen=True)
class _State:
    """A checkpoint as it is under its patches."""

    headers: Headers
    touched: Mapping[str, Touched]

    @classmethod
    def of(cls, subject: OnDisk) -> _State:
        found = subject.plan()
        touched = {} if found is None else {tensor.name: tensor for tensor in found.touched}
        return cls(read_headers(subject.folder), touched)

    def layout(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Dtype and shape of a tensor; None where there is none."""
        found = self.touched.get(name) or self.headers.tensors.get(name)
        return None if found is None else (found.dtype, found.shape)

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of a tensor, in order."""
        if name in self.touched:
            return edited_bytes(self.headers.folder, self.touched[name])
        return stored_bytes(self.headers.folder, self.headers.tensors[name])


def _same(name: str, a: _State, b: _State) -> bool:
    if a.layout(name) is None or a.layout(name) != b.layout(name):
        return False
    if name not in a.touched and name not in b.touched:
        x, y = a.headers.tensors[name], b.headers.tensors[name]
        if x.start == y.start and (a.headers.folder / x.file).samefile(b.headers.folder / y.file):
            return True
    return same_pieces(a.pieces(name), b.pieces(name))


def stored_bytes(folder: Path, entry: Entry) -> Iterator[Bytes]:
    """Yield the bytes of a tensor as they lie in its file."""
    descriptor = os.open(folder / entry.file, os.O_RDONLY)
    try:
        for start in range(entry.start, entry.end, STEP):
            yield read_exactly(descriptor, start, min(start + STEP, entry.end))
    finally:
        os.close(descriptor)


def same_pieces(first: Iterator[Bytes], second: Iterator[Bytes]) -> bool:
    """Whether two streams of bytes are the same, however they are cut."""
    empty = np.empty(0, dtype=np.uint8)
    a, b = empty, empty
    while True:
        a, b = (piece if len(piece) else next(stream, empty) for piece, stream in ((a, first), (b, second)))
        common = min(len(a), len(b))
        if common == 0:
            return len(a) == len(b)
        if not np.array_equal(a[:common], b[:common]):
            return False
        a, b = a[common:], b[common:]
