"""The store: steerings by what they do, in a folder that every process of an engine can read.

    STORE/FINGERPRINT/steering.yaml (+ steering.safetensors)

What lies there is never changed: a steering file that is edited under a running server is another fingerprint, and
requests that were admitted before keep what they were admitted with.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from steer.backends.vllm.kept import Kept
from steer.errors import SteerError
from steer.steering import Steering
from steer.weights import cache_folder


def usual() -> Path:
    """Where steerings are kept if nobody says where: one folder for every engine of a user.

    It is among what an engine is told at start, by which vLLM keeps compiled code apart: a folder of another name at every
    start would have everything compiled again. It may be removed while no engine runs.
    """
    return cache_folder() / "vllm-store"


class Store:
    """A folder of steerings, named by their fingerprints.

    Args:
        folder: exists, on every machine that takes part.

    Raises:
        SteerError: there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SteerError(
                f"there is no store of steerings {self.folder}",
                "a folder that every machine of the engine can read",
                "Give a folder on a shared disk (--store)",
            )
        self._read: Kept[Steering] = Kept()

    def put(self, steering: Steering) -> str:
        """Keep a steering and return its fingerprint; what is there already stays, unless it cannot be read any more.

        Raises:
            SteerError: a `Custom` function takes part, which cannot be written down.
            OSError: the disk or the permissions refuse.
        """
        base = steering.fingerprint
        if not self._has(base):
            beside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                steering.save(beside / "new" / "steering.yaml")
                if (self.folder / base).exists():
                    (self.folder / base).rename(beside / "damaged")
                (beside / "new").rename(self.folder / base)
            except OSError:
                if not self._has(base):  # Another process may have been faster.
                    raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        self._keep(base, steering)
        return base

    def get(self, base: str) -> Steering:
        """Return a steering.

        Raises:
            SteerError: there is none, it is damaged, or does something else than its name says.
        """
        known = self._read.get(base)
        if known is not None:
            return known
        path = self.folder / base / "steering.yaml"
        if not base.isalnum() or not path.is_file():
            raise SteerError(f"the store {self.folder} has no steering {base[:40]!r}", "one that was put there")
        steering = Steering.load(path)
        if steering.fingerprint != base:
            raise SteerError(f"{path} is the steering {steering.fingerprint}", f"{base}, as its folder says")
        self._keep(base, steering)
        return steering

    def _has(self, base: str) -> bool:
        if not (self.folder / base / "steering.yaml").is_file():
            return False
        try:
            self.get(base)
        except SteerError:  # Cut off, or cleaned up in part.
            return False
        return True

    def _keep(self, base: str, steering: Steering) -> None:
        size = sum(each.vectors.numel() * each.vectors.element_size() for each in steering.directions)
        self._read.put(base, steering, size)
