"""From one job to the bytes that are written, with what is worth knowing about them: hash, changes, survival."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edits.checkpoint.stream import Bytes, Json
from edits.merge.job import Job
from edits.merge.pieces import CHUNK, TORCH, Reader, Room, Rooms, reading
from edits.merge.stream import STREAMS, changes
from steer.anatomy.headers import BYTES

_WORD: dict[str, type[np.unsignedinteger[Any]]] = {
    "F64": np.uint64,
    "F32": np.uint32,
    "BF16": np.uint16,
    "F16": np.uint16,
}
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "BF16": 0xFF << 7, "F16": 0x1F << 10}
OUT = 0
"""The first room holds what goes out, the others the sources."""


class Produced:
    """Makes one tensor, and remembers what happened; one use.

    Args:
        job: what to do.
        rooms: buffers, shared by all tensors of a merge; the first is the output's.
    """

    def __init__(self, job: Job, rooms: Rooms) -> None:
        self._job, self._rooms = job, rooms
        self._hash, self._changed, self._odd = hashlib.sha256(), 0, 0
        self._wanted: list[float] = []
        self._actual: list[float] = []
        self._inner: list[float] = []
        self._note: dict[str, object] = {}

    def pieces(self) -> Iterator[Bytes]:
        """Yield the bytes in order; each piece is valid until the next."""
        job = self._job
        out = self._rooms[OUT]
        with reading(job.sources, self._rooms.after(1)) as reader:
            for result in STREAMS[job.method](job, reader, self._note):
                if changes(job):
                    yield self._added(reader, result, out)
                else:
                    yield self._stored(reader, result, out)

    def _added(self, reader: Reader, change: Tensor, out: Room) -> Bytes:
        """Add a piece of the change to the base, cast, and measure what is left of it."""
        size, base = change.numel(), reader.rooms[0].wide[: change.numel()]
        self._wanted.append(_inner(change, change))
        exact = out.wide[:size].copy_(change).add_(base)
        data = self._stored(reader, exact, out)
        actual = exact.copy_(_typed(data, self._job.dtype)).sub_(base)
        self._actual.append(_inner(actual, actual))
        self._inner.append(_inner(actual, change))
        return data

    def _stored(self, reader: Reader, exact: Tensor, out: Room) -> Bytes:
        job, size = self._job, exact.numel()
        data: Bytes = out.raw[: size * BYTES[job.dtype]]
        _typed(data, job.dtype).copy_(exact)
        self._hash.update(data.data)
        words: NDArray[Any] = data.view(_WORD[job.dtype])
        if job.comparable:
            self._changed += int(np.count_nonzero(words != reader.raw(0, size).view(_WORD[job.dtype])))
        mask = _WORD[job.dtype](_EXPONENT[job.dtype])
        self._odd += int(np.count_nonzero((words & mask) == mask))
        return data

    def record(self) -> Json:
        """Say what happened, once all pieces are through; a plain value for the journal."""
        job = self._job
        wanted, actual, inner = _root(self._wanted), _root(self._actual), _sum(self._inner)
        found: Json = {
            "name": job.name,
            "file": job.file,
            "method": job.method,
            "models": [term.model for term in job.terms],
            "after": f"sha256:{self._hash.hexdigest()}",
            "numbers": math.prod(job.shape),
            "changed": self._changed if job.comparable else None,
            "not_finite": self._odd,
            "wanted": _finite(wanted) if changes(job) else None,
            "survived": _finite(actual / wanted) if changes(job) and wanted else None,
            "cosine": _finite(inner / (wanted * actual)) if changes(job) and wanted and actual else None,
            "filled": job.filled,
        }
        return found | self._note


def _typed(data: Bytes, dtype: str) -> Tensor:
    return torch.from_numpy(data).view(TORCH[dtype])


def _inner(first: Tensor, second: Tensor) -> float:
    """One pass without a temporary, in one thread."""
    return float(np.einsum("i,i->", first.numpy(), second.numpy()))


def _sum(parts: list[float]) -> float:
    return math.fsum(parts) if all(map(math.isfinite, parts)) else math.inf


def _root(squares: list[float]) -> float:
    return math.sqrt(_sum(squares))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def memory(sources: int) -> int:
    """Return the bytes of buffers and temporaries that a merge of tensors with this many sources holds, at most."""
    return (sources + 1) * CHUNK * 16 + 6 * CHUNK * 8
