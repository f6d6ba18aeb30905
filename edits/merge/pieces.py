"""Stored tensors read piece by piece as float64, into buffers that are used again for the next piece.

A piece has `CHUNK` numbers, whatever the tensor and the memory, so every sum over pieces has one order. Memory is a
few megabytes per source and does not grow with the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.anatomy.headers import BYTES, Entry
from steer.errors import SteerError

CHUNK = 1 << 18
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

    @property
    def has(self) -> int:
        """Numbers on disk among those wanted."""
        return min(self.count, (self.entry.end - self.entry.start) // BYTES[self.entry.dtype])


@dataclass
class Room:
    """Buffers of one source: bytes as stored, and the same numbers in float64."""

    raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = field(default_factory=lambda: np.empty(CHUNK * 8, np.uint8))
    wide: Tensor = field(default_factory=lambda: torch.empty(CHUNK, dtype=torch.float64))


class Rooms:
    """Buffers by number, made at first use; one set serves a whole merge."""

    def __init__(self) -> None:
        self._made: list[Room] = []
        self._first = 0

    def after(self, first: int) -> Rooms:
        """Return the same buffers, counted from another one."""
        view = Rooms()
        view._made, view._first = self._made, self._first + first
        return view

    def __getitem__(self, number: int) -> Room:
        number += self._first
        while len(self._made) <= number:
            self._made.append(Room())
        return self._made[number]

    @property
    def bytes(self) -> int:
        """Memory that they hold."""
        return len(self._made) * CHUNK * 16


class Reader:
    """Several tensors of one length, read side by side; may be read again from the beginning.

    Args:
        stored: the tensors.
        rooms: buffers; source i uses number i.
        files: descriptors, one per tensor.
    """

    def __init__(self, stored: Sequence[Stored], rooms: Rooms, files: Sequence[int]) -> None:
        self.stored, self.rooms, self._files = tuple(stored), rooms, files
        self.count = stored[0].count

    def pieces(self, *which: int) -> Iterator[list[Float[Tensor, " n"]]]:
        """Yield piece after piece of the chosen sources; each is valid, and may be changed, until the next."""
        chosen = which or tuple(range(len(self.stored)))
        for start in range(0, self.count, CHUNK):
            size = min(CHUNK, self.count - start)
            yield [self._read(source, start, size) for source in chosen]

    def raw(self, source: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Return the bytes of the piece of `size` numbers that was read last from a source."""
        return self.rooms[source].raw[: size * BYTES[self.stored[source].entry.dtype]]

    def _read(self, source: int, start: int, size: int) -> Float[Tensor, " n"]:
        stored, room = self.stored[source], self.rooms[source]
        width = BYTES[stored.entry.dtype]
        there = max(0, min(size, stored.has - start))
        wide = room.wide[:size]
        if there:
            self._fill(source, stored.entry.start + start * width, room.raw[: there * width])
            wide[:there].copy_(torch.from_numpy(room.raw[: there * width]).view(TORCH[stored.entry.dtype]))
        if there < size:
            wide[there:] = self._read(0, start, size)[there:]
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
