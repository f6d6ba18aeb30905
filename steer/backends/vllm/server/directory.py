"""The folder of steerings that a server offers: `NAME.yaml` with its vectors, and folders of LoRA adapters.

A name is the file's, without `.yaml`. Files are looked at again at every use, by time, size and inode, and read again
when these changed; a file that can no longer be read is refused with the reason, never served as it was.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from steer.adapters import CONFIG, WEIGHTS
from steer.errors import SteerError
from steer.identity import digest
from steer.steering import Steering, sentence

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED = ("none", "off", "unknown")
UNSETTLED = 2.0
"""Seconds after a change in which another change may leave time and size as they are, on coarse file systems."""

Fits = Callable[[Steering], str]
"""Says why a steering cannot be served by the engine that runs; empty where it can."""
Stamp = tuple[tuple[int, int, int, int], ...]
"""Time of change, of status, size and inode of each file that an entry consists of."""


@dataclass(frozen=True)
class Entry:
    """One name of the folder.

    Attributes:
        name: what requests ask for.
        steering: what was read; None for an adapter, and for what cannot be read.
        fingerprint: of the content; empty where it cannot be read.
        modified: when the newest of its files changed, in seconds since 1970.
        size: bytes of all its files.
        problem: why it cannot be served; empty where it can.
        adapter: whether it is a LoRA adapter.
    """

    name: str
    steering: Steering | None
    fingerprint: str
    modified: float
    size: int
    problem: str = ""
    adapter: bool = False

    def describe(self) -> dict[str, object]:
        """Return what `GET /steerings` says about it."""
        interventions = () if self.steering is None else self.steering.interventions
        return {
            "name": self.name,
            "kind": "adapter" if self.adapter else "steering",
            "fingerprint": self.fingerprint or None,
            "interventions": [sentence(each) for each in interventions],
            "sites": sorted({each.site for each in interventions}),
            "layers": sorted({layer for each in interventions for layer in each.active_layers}),
            "phases": sorted({each.phase for each in interventions}) or ["all"] * self.adapter,
            "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.modified)),
            "bytes": self.size,
            "servable": not self.problem,
            "problem": self.problem or None,
        }


class Directory:
    """The folder, and what was read of it.

    Args:
        folder: holds steerings and adapters; None offers nothing.
        fits: what the engine can serve; everything if not given.
        adapters: name and fingerprint of the adapters that the engine was started with.

    Raises:
        SteerError: there is no such folder.
    """

    def __init__(
        self, folder: Path | None, fits: Fits = lambda steering: "", adapters: dict[str, str] | None = None
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise SteerError(f"there is no folder {folder}", "a folder of steerings", "Give one with --steerings")
        self.folder = None if folder is None else folder.resolve()
        self._fits = fits
        self._adapters = adapters
        self._read: dict[str, tuple[Stamp, int, float, Entry]] = {}
        self._lock = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """Return every name that a request can ask for, sorted.

        Raises:
            OSError: the folder cannot be read.
        """
        if self.folder is None:
            return ()
        self.folder.stat()  # `glob` does not say that a folder is gone.
        names = {path.stem for path in self.folder.glob("*.yaml")}
        names |= {path.parent.name for path in self.folder.glob(f"*/{CONFIG}")}
        return tuple(sorted(name for name in names if NAME.fullmatch(name) and name not in RESERVED))

    def entries(self, most: int) -> tuple[Entry, ...]:
        """Return all entries by name, those that cannot be served too; `most` as in `find`.

        Raises:
            OSError: the folder cannot be read.
        """
        found = (self.find(name, most) for name in self.names())
        return tuple(entry for entry in found if entry is not None)

    def find(self, name: str, most: int) -> Entry | None:
        """Return what a name stands for at this moment, or None where there is no such name.

        Args:
            name: any text; only names of files directly in the folder are looked for.
            most: bytes that a steering may have, its vectors included.

        Raises:
            OSError: the folder cannot be read.
        """
        if self.folder is None or not NAME.fullmatch(name) or name in RESERVED:
            return None
        self.folder.stat()
        steering, adapter = self.folder / f"{name}.yaml", self.folder / name
        with self._lock:
            if steering.is_file():
                both = "There is an adapter of the same name." if (adapter / CONFIG).is_file() else ""
                return self._entry(name, (steering, steering.with_suffix(".safetensors")), most, problem=both)
            return self._entry(name, (adapter / CONFIG, adapter / WEIGHTS), most, adapter=True)

    def _entry(
        self, name: str, paths: tuple[Path, ...], most: int, adapter: bool = False, problem: str = ""
    ) -> Entry | None:
        stamp, began = _stamp(paths), time.time()
        if not stamp:
            self._read.pop(name, None)
            return None
        known = self._read.get(name)
        if known is not None and known[:2] == (stamp, most) and known[2] > UNSETTLED:
            return known[3]
        size, modified = sum(each[2] for each in stamp), max(each[0] for each in stamp) / 1e9
        steering, fingerprint, problem = None, "", problem or self._outside(paths)
        if not problem and size > most:
            problem = f"It has {size} bytes; at most {most} are served here."
        if not problem:
            try:
                steering, fingerprint = (None, _content(paths)) if adapter else _load(paths[0])
                problem = self._fits(steering) if steering is not None else self._unknown_adapter(name, fingerprint)
            except (SteerError, OSError) as error:
                problem = str(error).replace(f"{self.folder}/", "")
        if _stamp(paths) != stamp:
            self._read.pop(name, None)
            return Entry(name, None, "", modified, size, "It is being written. Ask again when that is done.", adapter)
        entry = Entry(name, steering, fingerprint, modified, size, problem, adapter)
        self._read[name] = (stamp, most, began - max(max(each[:2]) for each in stamp) / 1e9, entry)
        return entry

    def _outside(self, paths: tuple[Path, ...]) -> str:
        """Say which file lies outside the folder; a link may point to another file inside."""
        for path in paths:
            if path.exists() and not path.resolve().is_relative_to(str(self.folder)):
                return f"{path.name} is a link to a file outside the folder of steerings."
        return ""

    def _unknown_adapter(self, name: str, fingerprint: str) -> str:
        if self._adapters is None or self._adapters.get(name) == fingerprint:
            return ""
        changed = "has changed" if name in self._adapters else "was put there"
        return f"The adapter {changed} since the server was started. Start it again to serve it."


def _load(path: Path) -> tuple[Steering, str]:
    steering = Steering.load(path)
    return steering, steering.fingerprint


def _content(paths: tuple[Path, ...]) -> str:
    return digest(path.read_bytes() for path in paths)


def _stamp(paths: tuple[Path, ...]) -> Stamp:
    states = []
    for path in paths:
        with suppress(FileNotFoundError):  # Removed in between.
            if path.exists():
                states.append(path.stat())
    return tuple((state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino) for state in states)
