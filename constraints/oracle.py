"""Make `.venv-oracle`, or repair it: `python3.11 constraints/oracle.py` (what `make oracle` runs; standard library only).

It holds mergekit, against which merging is tested, apart from `.venv`, so that nothing of ours can come to depend on
it. What mergekit itself needs, torch and transformers first, is read from `.venv` through a .pth file: the pins there
satisfy it, and a second torch would be two gigabytes. Where the packages cannot be had this says so and ends well;
the tests that need them are then skipped with that reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ".venv-oracle"
PINS = Path("constraints/oracle.txt")
STAMP = ".steer-stamp"
CHECK = "import mergekit.merge, mergekit.scripts.run_yaml"


def stamp(root: Path) -> str:
    """Return what a finished environment of `root` says of itself: a hash of pins, interpreter, place and neighbour."""
    seed = hashlib.sha256()
    for part in (sys.version, os.path.realpath(sys.base_prefix), str(root.resolve())):
        seed.update(part.encode() + b"\0")
    for path in (root / PINS, root / "constraints" / "cpu.txt", Path(__file__)):
        seed.update(path.read_bytes() + b"\0")
    return seed.hexdigest()


def fault(root: Path) -> str | None:
    """Say why the environment of `root` cannot be trusted, or None."""
    venv = root / VENV
    if not (venv / STAMP).is_file():
        return "there is none that was finished"
    if (venv / STAMP).read_text() != stamp(root):
        return "it belongs to another place, interpreter or set of packages"
    if not os.access(venv / "bin" / "python", os.X_OK):
        return "its interpreter is gone"
    return None


def make(root: Path) -> str | None:
    """Make the environment of `root` from nothing; say what failed, or None."""
    venv = root / VENV
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    python = venv / "bin" / "python"
    if not run([sys.executable, "-m", "venv", str(venv)], root):
        return "python -m venv failed"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps"]
    if not run([*pip, "--requirement", str(PINS)], root):
        return f"pip install of {PINS} failed"
    site = sysconfig.get_path("purelib", vars={"base": str(venv)})
    shared = sysconfig.get_path("purelib", vars={"base": str(root / ".venv")})
    (Path(site) / "shared.pth").write_text(shared + "\n")
    if not run([str(python), "-c", CHECK], root):
        return "mergekit cannot be imported"
    (venv / STAMP).write_text(stamp(root))
    return None


def run(command: list[str], root: Path) -> bool:
    """Run one step; pip's settings come from the machine, Python's from nowhere else."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode == 0


def main() -> None:
    """Check the environment and make it again where it cannot be trusted; never fail."""
    if fault(ROOT) is None:
        return
    start = time.monotonic()
    failed = make(ROOT)
    if failed:
        print(
            f"oracle: no mergekit to compare with ({failed}; see above); its tests will be skipped and counted.",
            file=sys.stderr,
        )
        return
    print(f"oracle: {VENV} is ready after {time.monotonic() - start:.0f} s.", file=sys.stderr)


if __name__ == "__main__":
    main()
