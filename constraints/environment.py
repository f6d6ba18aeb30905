"""Make `.venv`, or repair it: `python3.11 constraints/environment.py` (what `make setup` runs; standard library only).

The environment is trusted when its stamp says that it was finished here, by this interpreter, from these pins, and
when every file that its packages recorded is still there with its size. Otherwise it is removed and made again.
Packages come from wherever pip is configured to look.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = Path("constraints/cpu.txt")
INPUTS = (Path("pyproject.toml"), PINS)
STAMP = ".steer-stamp"
OLDEST = (3, 11)
TESTED = (3, 11)


def stamp(root: Path) -> str:
    """Return what a finished environment of `root` says of itself: a hash of inputs, interpreter and place."""
    seed = hashlib.sha256()
    for part in (sys.version, os.path.realpath(sys.base_prefix), str(root.resolve())):
        seed.update(part.encode() + b"\0")
    for name in INPUTS:
        seed.update((root / name).read_bytes() + b"\0")
    return seed.hexdigest()


def fault(root: Path) -> str | None:
    """Say why the environment of `root` cannot be trusted, or None."""
    venv = root / ".venv"
    if not venv.exists() and not venv.is_symlink():
        return "there is none yet"
    if not (venv / STAMP).is_file():
        return "it was not finished, or not made by us"
    if (venv / STAMP).read_text() != stamp(root):
        return "it belongs to another place, interpreter or set of packages"
    python = venv / "bin" / "python"
    if not os.access(python, os.X_OK):
        return "its interpreter is gone"
    missing = next(damaged(venv), None)
    return f"{missing} is missing or damaged" if missing else None


def damaged(venv: Path) -> Iterator[Path]:
    """Yield files that installed packages recorded and that are not there with their size."""
    records = sorted(venv.glob("lib/python*/site-packages/*.dist-info/RECORD"))
    installed = {_plain(record.parent.name.split("-")[0]) for record in records}
    for name in pinned(venv.parent):
        if _plain(name) not in installed:
            yield Path(name)
    for record in records:
        place = f"{record.parent.parent}{os.sep}"
        with record.open(newline="", encoding="utf-8") as rows:
            for name, _, size in csv.reader(rows):
                if size and not _has_size(place + name, int(size)):
                    yield Path(name)


def pinned(root: Path) -> list[str]:
    """Return the names of the packages that the pins ask for."""
    lines = (root / PINS).read_text().splitlines()
    return [line.split("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")]


def make(root: Path) -> None:
    """Make the environment of `root` from nothing.

    Raises:
        SystemExit: a step failed; the message says which.
    """
    venv = root / ".venv"
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    run([sys.executable, "-m", "venv", str(venv)], root, "python -m venv (on Debian: apt-get install python3.11-venv)")
    # Without compiling, which is half the work: most modules are never imported, the others are compiled when they are.
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-compile"]
    torch = next(line for line in (root / PINS).read_text().splitlines() if line.startswith("torch=="))
    # torch first and with what it depends on: its build for processors needs less than the others.
    run([*pip, "--constraint", str(PINS), torch], root, "pip install torch")
    run([*pip, "--no-deps", "--requirement", str(PINS)], root, "pip install")
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", "."], root, "pip install of this folder")
    (venv / STAMP).write_text(stamp(root))


def run(command: list[str], root: Path, what: str) -> None:
    """Run one step; pip's settings come from the machine, Python's from nowhere else."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    if subprocess.run(command, cwd=root, env=environment, check=False).returncode:
        raise SystemExit(f"setup: {what} failed; see above. Nothing half-made is trusted: `make setup` starts again.")


def _has_size(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size  # noqa: PTH116  (forty thousand of them; Path takes twice as long)
    except OSError:
        return False


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def main() -> None:
    """Check the environment and make it again where it cannot be trusted."""
    if sys.version_info[:2] < OLDEST:
        raise SystemExit(
            f"setup: this is Python {sys.version.split()[0]}; Python 3.11 or newer is needed (PYTHON=… make)."
        )
    reason = fault(ROOT)
    if reason is None:
        return
    if sys.version_info[:2] != TESTED:
        print(f"setup: Python {sys.version.split()[0]}; the pins were tested on 3.11.", file=sys.stderr)
    print(f"setup: making .venv ({reason}); this takes a minute or two.", file=sys.stderr, flush=True)
    start = time.monotonic()
    make(ROOT)
    print(f"setup: .venv is ready after {time.monotonic() - start:.0f} s.", file=sys.stderr)


if __name__ == "__main__":
    main()
