"""What an edited checkpoint keeps in `steer/undo` so that it can be taken back.

Always: the small files that were replaced (config.json, the index, the card), and the headers of shards that got a
new one. With `keep_undo` also, per shard, a safetensors file of the original numbers that may have changed: of each
touched tensor one row of numbers, its boxes one after the other (see `touched`). What only changed its dtype needs
nothing: a 16-bit number that was widened is narrowed again exactly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edits.checkpoint.card import CARD
from edits.checkpoint.folder import FileTask, Progress
from edits.checkpoint.manifest import UNDO
from edits.checkpoint.stream import Bytes, Json, read_exactly, safetensors_header, write_all
from edits.checkpoint.touched import Axes, Box, Touched, box_numbers
from edits.checkpoint.write import file_hash
from steer.anatomy.headers import BYTES, INDEX, Entry

if TYPE_CHECKING:
    from edits.checkpoint.plan import Plan

PIECE = 1 << 20


def rewritten(plan: Plan) -> set[str]:
    """Shards that get another header."""
    return {tensor.file for tensor in (*plan.touched, *plan.widened) if tensor.is_new_layout}


def tasks(plan: Plan, keep_undo: bool) -> list[FileTask]:
    """Return the files of the undo."""
    again = rewritten(plan)
    replaced = {CARD, *(["config.json"] if plan.config else []), *([INDEX] if again else [])}
    found = [_small(f"{UNDO}/{file.name}", file.path.read_bytes()) for file in plan.files if file.name in replaced]
    for file in plan.files:
        if file.name in again:
            with file.path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                found.append(_small(f"{UNDO}/{file.name}.header", stream.read(8 + length)))
        held = [tensor for tensor in plan.touched if tensor.file == file.name and tensor.boxes]
        if held and keep_undo:
            found.append(_kept(f"{UNDO}/{file.name}", file.path, held))
    return found


def _small(name: str, data: bytes) -> FileTask:
    def write(target: int, progress: Progress) -> Json:
        write_all(target, data, 0)
        progress(len(data))
        return {}

    return FileTask(name, len(data), write, lambda path, record: path.read_bytes() == data)


def _kept(name: str, source: Path, tensors: list[Touched]) -> FileTask:
    """The original numbers of one shard's touched tensors."""
    sizes = {tensor.name: sum(map(box_numbers, tensor.boxes)) for tensor in tensors}
    words = {tensor.name: tensor.entry.dtype for tensor in tensors if tensor.entry is not None}
    entries = {key: (words[key], (count,), count * BYTES[words[key]]) for key, count in sizes.items()}
    header = safetensors_header(dict(sorted(entries.items(), key=lambda item: -BYTES[item[1][0]])))
    ordered = sorted(tensors, key=lambda tensor: -BYTES[words[tensor.name]])

    def write(target: int, progress: Progress) -> Json:
        opened, position, digest = os.open(source, os.O_RDONLY), len(header), hashlib.sha256(header)
        try:
            write_all(target, header, 0)
            progress(position)
            for tensor in ordered:
                assert tensor.entry is not None
                for piece in originals(opened, tensor.entry, tensor.axes, tensor.boxes):
                    write_all(target, piece, position)
                    digest.update(piece.data)
                    position += piece.nbytes
                    progress(piece.nbytes)
        finally:
            os.close(opened)
        return {"sha256": digest.hexdigest()}

    size = len(header) + sum(nbytes for _, _, nbytes in entries.values())
    return FileTask(name, size, write, lambda path, record: file_hash(path) == record["sha256"])


def originals(source: int, entry: Entry, axes: Axes, boxes: tuple[Box, ...]) -> Iterator[Bytes]:
    """Yield the bytes of the boxes of a stored tensor, in order."""
    _, rows, width = axes
    size = BYTES[entry.dtype]
    step = max(1, PIECE // max(1, width * size))
    for e0, e1, r0, r1, c0, c1 in boxes:
        for expert in range(e0, e1):
            for start in range(r0, r1, step):
                stop = min(start + step, r1)
                first, last = ((expert * rows + row) * width * size for row in (start, stop))
                data = read_exactly(source, entry.start + first, entry.start + last).reshape(stop - start, -1)
                yield np.ascontiguousarray(data[:, c0 * size : c1 * size]).reshape(-1)
