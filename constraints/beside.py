"""Environments beside `.venv`, for programs that the tests compare with (standard library only).

Each holds what one foreign program needs and `.venv` lacks, apart from `.venv`, so that nothing of ours can come to
depend on it. Everything else, torch and transformers first, is read from `.venv` through a .pth file, behind the
environment's own packages: a second torch would be two gigabytes. The folder of this project is on the path as well.
Where the packages cannot be had this says so and ends well; the tests that need them are then skipped with that reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".steer-stamp"


@dataclass(frozen=True)
class Beside:
    """`.venv-NAME`, made from the pins of `constraints/NAME.txt`; `program` is what it is there for."""

    name: str
    program: str
    root: Path = ROOT

    @property
    def venv(self) -> Path:
        """The folder of the environment."""
        return self.root / f".venv-{self.name}"

    @property
    def pins(self) -> Path:
        """The exact versions that it holds."""
        return self.root / "constraints" / f"{self.name}.txt"

    def stamp(self) -> str:
        """Return what a finished environment says of itself: a hash of pins, interpreter, place and neighbour."""
        seed = hashlib.sha256()
        for part in (sys.version, os.path.realpath(sys.base_prefix), str(self.root.resolve())):
            seed.update(part.encode() + b"\0")
        for path in (self.pins, self.root / "constraints" / "cpu.txt", Path(__file__)):
            seed.update(path.read_bytes() + b"\0")
        return seed.hexdigest()

    def fault(self) -> str | None:
        """Say why the environment cannot be trusted, or None."""
        if not (self.venv / STAMP).is_file():
            return "there is none that was finished"
        if (self.venv / STAMP).read_text() != self.stamp():
            return "it belongs to another place, interpreter or set of packages"
        if not os.access(self.venv / "bin" / "python", os.X_OK):
            return "its interpreter is gone"
        return None

    def make(self) -> str | None:
        """Make the environment from nothing; say what failed, or None. `.venv` need not be there yet."""
        if self.venv.is_symlink() or self.venv.is_file():
            self.venv.unlink()
        elif self.venv.exists():
            shutil.rmtree(self.venv)
        if not self._run([sys.executable, "-m", "venv", str(self.venv)]):
            return "python -m venv failed"
        # Without compiling: most of these modules are never imported, and the others are compiled when they are.
        pip = [str(self.venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        if not self._run([*pip, "--no-deps", "--no-compile", "--requirement", str(self.pins)]):
            return f"pip install of {self.pins.relative_to(self.root)} failed"
        site, shared = (
            sysconfig.get_path("purelib", vars={"base": str(base)}) for base in (self.venv, self.root / ".venv")
        )
        (Path(site) / "shared.pth").write_text(f"{shared}\n{self.root}\n")
        (self.venv / STAMP).write_text(self.stamp())
        return None

    def main(self) -> None:
        """Check the environment and make it again where it cannot be trusted; never fail."""
        if self.fault() is None:
            return
        start = time.monotonic()
        if failed := self.make():
            told = f"no {self.program} to compare with ({failed}; see above); its tests will be skipped and counted."
        else:
            told = f"{self.venv.name} is ready after {time.monotonic() - start:.0f} s."
        print(f"{self.name}: {told}", file=sys.stderr)

    def _run(self, command: list[str]) -> bool:
        """Run one step; pip's settings come from the machine, Python's from nowhere else."""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        return subprocess.run(command, cwd=self.root, env=environment, check=False).returncode == 0
