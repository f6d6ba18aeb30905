"""Files that are either whole or not there: a temporary neighbour, flushed, then renamed.

Nothing here imports torch, so that headers can be inspected without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.errors import SteerError

MODE = 0o644


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        SteerError: `path` is a folder, or exists and `overwrite` is false.
    """
    if path.is_dir():
        raise SteerError(f"{path} is a folder", "the name of a file", "Give the name of a file inside it")
    if path.exists() and not overwrite:
        raise SteerError(
            f"{path} exists already",
            "a name that is free",
            "Choose another name, remove the file, or pass overwrite=True",
        )


@contextmanager
def replacing(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary neighbour that becomes `path` when the block ends well.

    The file gets mode 0644. When the block fails, `path` is as it was before and nothing else is left behind.

    Raises:
        SteerError: `path` is a folder, or exists and `overwrite` is false.
        OSError: the disk or the permissions refuse.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fchmod(descriptor, MODE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, overwrite: bool = False) -> None:
    """Write `text` as UTF-8, whole or not at all; errors as `replacing`."""
    with replacing(path, overwrite) as partial:
        partial.write_bytes(text.encode("utf-8"))
