"""The bytes of a stored tensor after a patch, piece by piece in the order of the file.

Element by element a tensor streams in pieces of `CHUNK` numbers along its first stored axis, whatever its size. A
projection sums over the columns of one matrix, so that matrix, for instance one expert of a fused tensor, is read
whole; where it is stored turned round (the embedding), every stored row is a whole column and it streams too. The
arithmetic is that of `steer.operations.edit_` on views of a piece, whose result does not depend on how a matrix is
cut, so memory and disk give the same bytes. A dtype that widens is widened before the arithmetic, which is exact.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edits.checkpoint.stream import Bytes, Json, read_exactly
from edits.checkpoint.touched import SlotEdit, Touched
from steer.anatomy.headers import BYTES
from steer.operations import Survival, edit_, exponents, reduces

CHUNK = 1 << 18
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": exponents.DTYPE,
}
"""Of bytes none are edited but the block exponents of MXFP4 (`edits.checkpoint.quantised.block_exponents`)."""


class Span(NamedTuple):
    """Rows of one expert of a stored tensor (expert 0 where it is not fused)."""

    expert: int
    start: int
    stop: int


class Editing:
    """Makes the bytes of one tensor, and remembers what happened; one use.

    Args:
        folder: the base.
        tensor: what to do.
    """

    def __init__(self, folder: Path, tensor: Touched) -> None:
        self._folder, self._tensor = folder, tensor
        self._before, self._after = hashlib.sha256(), hashlib.sha256()
        self._survival = Survival()

    def pieces(self) -> Iterator[Bytes]:
        """Yield the bytes in order; each piece belongs to the caller.

        Raises:
            SteerError: the file ends too early, or an operation does not fit.
        """
        tensor = self._tensor
        source = None if tensor.entry is None else os.open(self._folder / tensor.entry.file, os.O_RDONLY)
        try:
            for span in spans(tensor):
                data = self._read(source, span)
                self._before.update(data.data)
                data = self._edited(data, span)
                self._after.update(data.data)
                yield data
                del data  # Before the next one is read: a projection's piece is a whole matrix.
        finally:
            if source is not None:
                os.close(source)

    def _read(self, source: int | None, span: Span) -> Bytes:
        tensor = self._tensor
        _, rows, width = tensor.axes
        first, last = (span.expert * rows + span.start) * width, (span.expert * rows + span.stop) * width
        if source is None or tensor.entry is None:
            return np.zeros((last - first) * BYTES[tensor.dtype], dtype=np.uint8)
        size = BYTES[tensor.entry.dtype]
        return read_exactly(source, tensor.entry.start + first * size, tensor.entry.start + last * size)

    def _edited(self, raw: Bytes, span: Span) -> Bytes:
        tensor = self._tensor
        stored = tensor.dtype if tensor.entry is None else tensor.entry.dtype
        inner = tensor.shape[1:] if is_fused(tensor) else tensor.shape
        shape = (span.stop - span.start, *inner[1:]) if inner else ()
        piece = torch.from_numpy(raw).view(TORCH[stored]).view(shape)
        if stored != tensor.dtype:
            piece = piece.to(TORCH[tensor.dtype])
        for edit in tensor.edits:
            if edit.slot.expert in (None, span.expert) and (found := part_of(edit, piece, span.start)) is not None:
                view, origin = found
                self._survival += edit_(view, edit.operations, edit.head_width, origin)
        data: Bytes = piece.reshape(-1).view(torch.uint8).numpy()
        return data

    def record(self) -> Json:
        """Say what happened, once all pieces are through; a plain value for the journal."""
        tensor, survival = self._tensor, self._survival
        return {
            "name": tensor.name,
            "file": tensor.file,
            "matrix": tensor.label,
            "dtype": None if tensor.created or tensor.entry is None else tensor.entry.dtype,
            "before": None if tensor.created else "sha256:" + self._before.hexdigest(),
            "after": "sha256:" + self._after.hexdigest(),
            "wanted": finite(survival.wanted),
            "survived": finite(survival.share),
            "cosine": finite(survival.cosine),
            "axes": list(tensor.axes),
            "boxes": [list(box) for box in tensor.boxes],
        }


def finite(value: float | None) -> float | None:
    """Return a number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def edited_bytes(folder: Path, tensor: Touched) -> Iterator[Bytes]:
    """Yield the bytes of a touched tensor after its edits, in order, as `apply` writes them.

    Args:
        folder: the base.
        tensor: from a plan on it.
    """
    return Editing(folder, tensor).pieces()


def is_fused(tensor: Touched) -> bool:
    """Whether the first stored axis counts experts."""
    return any(edit.slot.expert is not None for edit in tensor.edits)


def spans(tensor: Touched) -> Iterator[Span]:
    """Cut a stored tensor into the pieces that it streams in."""
    experts, rows, width = tensor.axes
    for expert in range(experts):
        here = [edit for edit in tensor.edits if edit.slot.expert in (None, expert)]
        step = rows if any(map(_is_whole, here)) else max(1, CHUNK // max(1, width))
        for start in range(0, rows, max(1, step)):
            yield Span(expert, start, min(start + step, rows))


def _is_whole(edit: SlotEdit) -> bool:
    return reduces(edit.operations) and not edit.slot.transposed


def part_of(edit: SlotEdit, piece: Tensor, start: int) -> tuple[Tensor, tuple[int, int]] | None:
    """Cut the matrix out of some stored rows.

    Args:
        edit: the matrix.
        piece: stored rows of its tensor, or of its expert, from `start` on.
        start: number of the first.

    Returns:
        The view (out, in) and its first row and column in the matrix; None where the matrix has no part in the piece.
    """
    rows = edit.slot.rows
    if piece.dim() == 2 and edit.slot.transposed:
        return (piece.T if rows is None else piece.T[slice(*rows)]), (0, start)
    flat = piece.reshape(1, 1) if piece.dim() == 0 else piece.reshape(piece.shape[0], -1)
    if rows is None:
        return flat, (start, 0)
    begin, stop, step = rows
    end = start + flat.shape[0] if stop is None else min(stop, start + flat.shape[0])
    number = max(0, -(-(start - begin) // step))
    first = begin + number * step
    return None if first >= end else (flat[first - start : end - start : step], (number, 0))
