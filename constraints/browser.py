"""Install a browser for the browser lane where that is easy: as root on a Debian or Ubuntu, once; never fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TRIED = Path(sys.prefix) / ".browser-tried"
SECONDS = 240


def main() -> None:
    """Install chromium unless a browser is there, we are not root, or it was tried before."""
    if any(map(which, BROWSERS)) or TRIED.exists() or os.geteuid() != 0 or not which("apt-get"):
        return
    TRIED.touch()
    print("setup: installing chromium for the browser tests.", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    steps = (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
    for step in steps:
        try:
            done = subprocess.run(step, env=environment, timeout=SECONDS, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            print(f"setup: {' '.join(step)} took too long; the browser lane will say so.", file=sys.stderr)
            return
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"setup: {' '.join(step)} failed ({last}); the browser lane will say so.", file=sys.stderr)
            return


if __name__ == "__main__":
    main()
