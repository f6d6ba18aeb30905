"""Stored tensors read piece by piece as float64, into buffers that are used again for the next piece.

A piece has `CHUNK` numbers, whatever the tensor and the memory, so every sum over pieces has one order. Memory is a
few megabytes per source and does not grow with the tensor. (What is done to a piece stays in the cache of a core or
near it; half the size and twice the size were measured to be as fast, an eighth to be a third slower, since each torch
call costs a microsecond.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import local

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edits.merge.methods.ties import FEW
from steer.anatomy.headers import BYTES, Entry
from steer.errors import SteerError

CHUNK = 1 << 17
MAKERS = 2
"""Threads that merge, each another tensor. More would help on machines with more cores, up to what the disk takes."""
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """The first numbers of a tensor on disk.

    Attributes:
        path: of the file.
        entry: where the tensor lies in it.
        count: how many numbers are wanted; more than it has are taken from the first source of a reader.
    """

    path: Path
    entry: Entry
    count: int

    @cached_property
    def has(self) -> int:
        """Numbers on disk among those wanted."""
        return min(self.count, (self.entry.end - self.entry.start) // BYTES[self.entry.dtype])


@dataclass
class Room:
    """Buffers of one source: bytes as stored, and the same numbers in float64."""

    raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = field(default_factory=lambda: np.empty(CHUNK * 8, np.uint8))
    wide: Tensor = field(default_factory=lambda: torch.empty(CHUNK, dtype=torch.float64))


class Rooms(local):
    """Buffers, made at first use and shared by all tensors that a thread merges; every thread has its own.

    Attributes:
        spare: one more piece in float64.
        out: what a piece goes out in.
    """

    def __init__(self) -> None:
        self.spare = torch.empty(CHUNK, dtype=torch.float64)
        self.out = np.empty(CHUNK * 8, np.uint8)
        self._sources: list[Room] = []

    def source(self, number: int) -> Room:
        """Return the buffers of a source."""
        while len(self._sources) <= number:
            self._sources.append(Room())
        return self._sources[number]


@dataclass(frozen=True)
class Piece:
    """One piece of several tensors, side by side; valid until the next is read.

    Attributes:
        wide: the numbers of the chosen sources in float64; they may be changed.
        first: buffers of the first source.
    """

    wide: list[Float[Tensor, " n"]]
    first: Room


class Reader:
    """Several tensors of one length, read side by side; may be read again from the beginning.

    Args:
        stored: the tensors.
        rooms: buffers.
        files: descriptors, one per tensor.
    """

    def __init__(self, stored: Sequence[Stored], rooms: Rooms, files: Sequence[int]) -> None:
        self.stored, self._rooms, self._files = tuple(stored), rooms, files
        self.count = stored[0].count

    def pieces(self, *which: int) -> Iterator[Piece]:
        """Yield piece after piece of the chosen sources, of all of them if none is named."""
        chosen = which or tuple(range(len(self.stored)))
        for start in range(0, self.count, CHUNK):
            size, room = min(CHUNK, self.count - start), self._rooms.source
            yield Piece([self._read(source, start, size, room(source)) for source in chosen], room(0))

    def _read(self, source: int, start: int, size: int, room: Room) -> Float[Tensor, " n"]:
        stored = self.stored[source]
        width = BYTES[stored.entry.dtype]
        there = max(0, min(size, stored.has - start))
        wide = room.wide[:size]
        if there:
            self._fill(source, stored.entry.start + start * width, room.raw[: there * width])
            wide[:there].copy_(torch.from_numpy(room.raw[: there * width]).view(TORCH[stored.entry.dtype]))
        if there < size:
            wide[there:] = self._read(0, start, size, Room())[there:]
        return wide

    def _fill(self, source: int, position: int, buffer: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        view = buffer.data
        while len(view):
            count = os.preadv(self._files[source], [view], position)
            if count == 0:
                raise SteerError(
                    f"{self.stored[source].path} ends at byte {position}, earlier than its header says",
                    "a whole file",
                    "Download or copy the checkpoint again",
                )
            view, position = view[count:], position + count


@contextmanager
def reading(stored: Sequence[Stored], rooms: Rooms) -> Iterator[Reader]:
    """Open the files of some tensors of equal length.

    Raises:
        OSError: a file cannot be opened.
    """
    with ExitStack() as stack:
        files = []
        for each in stored:
            files.append(os.open(each.path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        yield Reader(stored, rooms, files)


def memory(sources: int, trims: bool = False) -> int:
    """Return the bytes of buffers and temporaries that a merge of tensors with this many sources holds, at most.

    Args:
        sources: how many are read side by side.
        trims: whether the edge of TIES is looked for, among `FEW` candidates.
    """
    return MAKERS * (sources * CHUNK * 16 + 8 * CHUNK * 8 + (3 * FEW * 8 if trims else 0))
