"""A process that does one thing when asked, timed by itself and, on request, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import resident

ROOT = Path(__file__).parents[1]
ORACLE = ROOT / ".venv-oracle" / "bin" / "python"
EVERY = 0.001  # Seconds between two looks at the memory.
# glibc keeps some of what is freed; so that held memory is seen, it gives back what it can, to every contestant alike.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def command(work: str) -> list[str]:
    """Return what starts the process for a work."""
    if work == "mergekit":
        return [str(ORACLE), str(ROOT / "benchmarks" / "mergekit_worker.py")]
    return [sys.executable, "-m", "benchmarks.contestants"]


class Worker:
    """A running process; used as a context, which ends it.

    Args:
        started: its command line.
        settings: of its environment.
    """

    def __init__(self, started: Sequence[str], settings: Mapping[str, str] | None = None) -> None:
        # mergekit's own interpreter must not see this one's paths; warnings go to a file that is shown if it fails.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | dict(settings or {})
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed on exit)
        self.process = subprocess.Popen(
            started, cwd=ROOT, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self) -> Worker:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, request: Mapping[str, Any]) -> float:
        """Send a request and return the seconds that the process measured.

        Raises:
            RuntimeError: the process ended instead; with the last it said.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return float(json.loads(line)["seconds"])
        self.errors.seek(0)
        raise RuntimeError(f"{request['work']} ended without an answer: {self.errors.read()[-2000:]}")

    def watched(self, request: Mapping[str, Any]) -> int:
        """Send a request and return the most anonymous memory seen until the answer, in bytes."""
        peak, done = [0], threading.Event()

        def look() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], resident(self.process.pid)["anonymous"])
                done.wait(EVERY)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            self.ask(request)
        finally:
            done.set()
            thread.join()
        return peak[0]


def memory(work: str, request: Mapping[str, Any]) -> dict[str, int]:
    """Return anonymous memory of a fresh process: at rest, with everything imported, and at most while it works."""
    with Worker(command(work), GIVE_BACK) as worker:
        worker.ask({**request, "work": "ready"})
        rest = resident(worker.process.pid)["anonymous"]
        return {"at_rest": rest, "peak": worker.watched(request)}
