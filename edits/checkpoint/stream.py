"""Bytes from one file to another: read, written, copied by the kernel; and the header of a safetensors file.

What stays goes through `copy_file_range`, which shares blocks on file systems that can and never brings the bytes into
this process. `write` puts files together from this.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steer.errors import SteerError

Bytes = NDArray[np.uint8]
Json = dict[str, Any]

STEP = 1 << 26
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def read_exactly(source: int, start: int, end: int) -> Bytes:
    """Read bytes `start` to `end` of an open file into a fresh, aligned buffer.

    Raises:
        SteerError: the file ends too early.
    """
    buffer = np.empty(end - start, dtype=np.uint8)
    view, position = buffer.data, start
    while position < end:
        count = os.preadv(source, [view[position - start :]], position)
        if count == 0:
            raise _short(position)
        position += count
    return buffer


def seen(data: Bytes | bytes) -> memoryview:
    """Return the bytes without a copy, as hashes and files take them."""
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


def write_all(target: int, data: Bytes | bytes, start: int) -> None:
    """Write all of `data` at byte `start` of an open file, however short the kernel's writes are."""
    view, done = seen(data), 0
    while done < len(view):
        done += os.pwrite(target, view[done : done + STEP], start + done)


def copy_range(source: int, target: int, start: int, end: int, at: int | None = None) -> None:
    """Copy bytes `start` to `end` to byte `at` of another open file (the same place if not given), by the kernel where it can.

    Raises:
        SteerError: the source ends too early.
        OSError: the disk refuses.
    """
    position, kernel, shift = start, hasattr(os, "copy_file_range"), 0 if at is None else at - start
    while position < end:
        count = min(end - position, STEP)
        if kernel:
            try:
                copied = os.copy_file_range(source, target, count, position, position + shift)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                kernel = False
                continue
            if copied == 0 and os.fstat(source).st_size > position:
                kernel = False
                continue
        else:
            block = os.pread(source, min(count, 1 << 23), position)
            write_all(target, block, position + shift)
            copied = len(block)
        if copied == 0:
            raise _short(position)
        position += copied


def _short(position: int) -> SteerError:
    return SteerError(
        f"a source file ends at byte {position}, earlier than its header says",
        "a whole file",
        "Download or copy the checkpoint again",
    )


def safetensors_header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of a safetensors file whose tensors follow in the order given.

    Args:
        entries: name -> (dtype as safetensors spells it, shape, bytes).
        metadata: of the file; transformers wants `format`.
    """
    described: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, size) in entries.items():
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
