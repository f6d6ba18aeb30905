"""From one job to the bytes that are written, with what is worth knowing about them: hash, changes, survival.

A piece is read, merged, measured, hashed and written by one thread, while it is in the cache of a core; `MAKERS` threads do
so at once, each with another tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edits.checkpoint.stream import Bytes, Json
from edits.merge.job import Job
from edits.merge.pieces import TORCH, Rooms, reading
from edits.merge.stream import STREAMS, Result, changes
from steer.anatomy.headers import BYTES

_WORD: dict[str, type[np.unsignedinteger[Any]]] = {
    "F64": np.uint64,
    "F32": np.uint32,
    "BF16": np.uint16,
    "F16": np.uint16,
}
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "BF16": 0xFF << 7, "F16": 0x1F << 10}


class Produced:
    """Makes one tensor, and remembers what happened.

    Args:
        job: what to do.
        rooms: buffers, shared by all tensors of a merge.
    """

    def __init__(self, job: Job, rooms: Rooms) -> None:
        self._job, self._rooms, self._changes, self._comparable = job, rooms, changes(job), job.comparable
        self._begin()

    def _begin(self) -> None:
        self._hash, self._changed, self._odd = hashlib.sha256(), 0, 0
        self._wanted: list[float] = []
        self._actual: list[float] = []
        self._inner: list[float] = []
        self._note: dict[str, object] = {}

    def pieces(self) -> Iterator[Bytes]:
        """Yield the bytes in order; each piece is valid until the next."""
        self._begin()
        with reading(self._job.sources, self._rooms) as reader:
            for result in STREAMS[self._job.method](self._job, reader, self._note):
                data = self._made(result)
                self._hash.update(data.data)
                yield data

    def _made(self, result: Result) -> Bytes:
        job, size = self._job, result.numbers.numel()
        data: Bytes = self._rooms.out[: size * BYTES[job.dtype]]
        stored = torch.from_numpy(data).view(TORCH[job.dtype])
        words: NDArray[Any] = data.view(_WORD[job.dtype])
        if self._changes:
            change, base, spare = result.numbers, result.piece.first.wide[:size], self._rooms.spare[:size]
            stored.copy_(torch.add(change, base, out=spare))
            actual = spare.copy_(stored).sub_(base)
            for sums, first, second in (
                (self._wanted, change, change),
                (self._actual, actual, actual),
                (self._inner, actual, change),
            ):
                sums.append(float(torch.dot(first, second)))
        else:
            stored.copy_(result.numbers)
        if self._comparable:
            before = result.piece.first.raw[: data.size].view(_WORD[job.dtype])
            self._changed += int(np.count_nonzero(words != before))
        if not self._changes or not math.isfinite(self._actual[-1]):
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
            "changed": self._changed if self._comparable else None,
            "not_finite": self._odd,
            "wanted": _plain(wanted) if self._changes else None,
            "survived": _plain(actual / wanted) if self._changes and wanted else None,
            "cosine": _plain(inner / (wanted * actual)) if self._changes and wanted and actual else None,
            "filled": job.filled,
        }
        return found | self._note


def _sum(parts: list[float]) -> float:
    return math.fsum(parts) if all(map(math.isfinite, parts)) else math.inf


def _root(squares: list[float]) -> float:
    return math.sqrt(_sum(squares))


def _plain(value: float) -> float | None:
    """Nine digits, which no order of a sum changes; None for what JSON cannot say."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
