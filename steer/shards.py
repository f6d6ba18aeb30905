"""Shards: fixed cuts of the work, and the journal that lets an interrupted run go on (DESIGN §3).

A shard is a function of the options alone: sorted ids, 64 at a time. It is the unit of batching, of the journal, of
resume and of distribution; results are reduced in shard order. So one process, several processes and a resumed run
give the same bytes on one machine at equal thread count. Timings stay in the journal and never enter results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.files import replacing, write_text
from steer.identity import canonical, digest

SHARD = 64


@dataclass(frozen=True)
class Shard:
    """The `index`-th cut; `ids` are sorted."""

    index: int
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """Stem of its journal files; other ids give another name."""
        return f"{self.index:05d}-{digest([canonical(self.ids).encode()])[:12]}"


def cut(ids: Iterable[str], size: int = SHARD) -> list[Shard]:
    """Cut items into shards; the order of `ids` does not matter.

    Raises:
        SteerError: an id occurs twice.
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"a shard of {size} items")
    ordered = sorted(ids)
    for first, second in pairwise(ordered):
        if first == second:
            raise SteerError(
                f"the id {first!r} occurs twice", "ids that differ, since random streams and results are keyed by them"
            )
    return [
        Shard(number, tuple(ordered[start : start + size])) for number, start in enumerate(range(0, len(ordered), size))
    ]


class Journal:
    """Finished shards of a run, one file each, in `folder`.

    Args:
        folder: made if it is missing.
        key: every option that results depend on, as plain data; a journal of other options is refused.
        suffix: of the shards' files.

    Raises:
        SteerError: the folder holds the journal of a run with other options, or something else.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], suffix: str = ".part") -> None:
        self.folder = Path(folder)
        self.suffix = suffix
        text = canonical(key)
        file = self.folder / "key.json"
        if not file.exists():
            write_text(file, text)
        elif (found := file.read_text("utf-8")) != text:
            raise SteerError(
                f"the journal in {self.folder} belongs to a run with other options ({_difference(found, key)})",
                "the options it was begun with",
                "Resume with those, or choose another output folder",
            )

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}{self.suffix}"

    def has(self, shard: Shard) -> bool:
        """Whether the shard is finished."""
        return self._file(shard).is_file()

    def read(self, shard: Shard) -> bytes:
        """What was written for a finished shard."""
        return self._file(shard).read_bytes()

    def write(self, shard: Shard, data: bytes, notes: Mapping[str, Any] | None = None) -> None:
        """Keep a finished shard, whole or not at all; `notes` (seconds, tokens) go to a neighbour and never into results.

        Raises:
            OSError: the disk or the permissions refuse.
        """
        if notes is not None:
            write_text(self.folder / f"{shard.name}.notes.json", canonical(notes), overwrite=True)
        with replacing(self._file(shard), overwrite=True) as partial:
            partial.write_bytes(data)


def _difference(found: str, key: Mapping[str, Any]) -> str:
    try:
        before = json.loads(found)
    except json.JSONDecodeError:
        return "its key.json is not readable"
    if not isinstance(before, dict):
        return "its key.json is not readable"
    now = json.loads(canonical(key))
    names = sorted(name for name in {*before, *now} if before.get(name, ...) != now.get(name, ...))
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
