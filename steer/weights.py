"""Weights ids: the hash of a checkpoint's weight files, from what is already known wherever possible.

Known without reading the weights: files of the Hugging Face cache, whose blobs are named by their SHA-256, and files
hashed before, remembered by path, size and time. Small checkpoints are hashed at once; others only when asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from steer.errors import SteerError
from steer.files import write_text
from steer.identity import UNKNOWN, digest

SMALL = 64 * 2**20


def cache_folder() -> Path:
    """Where things are kept that can be made again; under XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reasoning-steer"


def cache_file() -> Path:
    """Where hashes are remembered."""
    return cache_folder() / "weights.json"


def weights_id(folder: str | Path, files: tuple[str, ...], compute: bool = False) -> str:
    """Return the id of a checkpoint's weights, or "unknown".

    Args:
        folder: the checkpoint.
        files: plain names of its weight files.
        compute: read and hash files of any size where nothing is known.
    """
    paths = [Path(folder) / file for file in files]
    compute = compute or sum(path.stat().st_size for path in paths) <= SMALL
    hashes = [file_hash(path, compute) for path in paths]
    if UNKNOWN in hashes:
        return UNKNOWN
    return digest([f"{file} {value}".encode() for file, value in sorted(zip(files, hashes, strict=True))])


def file_hash(path: Path, compute: bool = True) -> str:
    """Return the SHA-256 of a file, remembered by path, size and time; "unknown" where it would have to be computed."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    state = real.stat()
    stamp = [state.st_size, state.st_mtime_ns]
    known = _remembered().get(str(real))
    if isinstance(known, list) and known[:2] == stamp and isinstance(known[-1], str):
        return known[-1]
    if not compute:
        return UNKNOWN
    with real.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(str(real), [*stamp, value])
    return value


def _remembered() -> dict[str, object]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # A cache that cannot be read is an empty cache.
        return {}
    return found if isinstance(found, dict) else {}


def _remember(path: str, entry: list[object]) -> None:
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(cache_file(), json.dumps(_remembered() | {path: entry}, indent=0), overwrite=True)
    except (OSError, SteerError):  # A read-only home only costs the hashing next time.
        return
