"""Ratios of running times that can be trusted on a machine that other people use too.

The two things compared run in pairs, one right after the other, in an order drawn anew for each pair; a third run, of
the reference once more, gives the A/A control: its ratio is 1 but for noise. What is reported is the median of the
paired ratios with a bootstrap interval over pairs; a bar is met when the interval's upper end lies below it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PAIRS = 15
RESAMPLES = 10_000
TICK = 1e-7  # seconds; shorter times are noise of the clock
Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of times.

    Attributes:
        median: of the paired ratios.
        low, high: 95 % bootstrap interval of that median.
    """

    median: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0) -> Ratio:
    """Return the median of `values` with its interval; ratios are resampled as they are, medians do not mind the scale."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(np.median(array[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(array)), float(low), float(high))


def compare(
    works: Mapping[str, Work], reference: str, *, pairs: int = PAIRS, warmups: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Time every work against `works[reference]`, interleaved.

    Args:
        works: name -> what to run; each does the same job.
        reference: the name that the others are divided by; it runs twice per round, for the control.
        pairs: rounds.
        warmups: rounds that are run and not counted.
        seed: of the order within rounds and of the bootstrap.

    Returns:
        Per other name `ratio` (wall time) and `cpu_ratio` (this process's processor time), the `control` of the
        reference against itself, and median seconds of each.
    """
    again = f"{reference} again"
    runs = {**works, again: works[reference]}
    order = np.random.default_rng(seed)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmups + pairs):
        for name in order.permutation(list(runs)):
            seconds, burnt = timed(runs[name])
            if number >= warmups:
                wall[name].append(seconds)
                cpu[name].append(burnt)

    def ratio(name: str, times: Mapping[str, list[float]]) -> dict[str, float]:
        return vars(bootstrap([a / max(b, TICK) for a, b in zip(times[name], times[reference], strict=True)], seed))

    others = [name for name in works if name != reference]
    return {
        "pairs": pairs,
        "reference": reference,
        "ratio": {name: ratio(name, wall) for name in others},
        "cpu_ratio": {name: ratio(name, cpu) for name in others},
        "control": {"ratio": ratio(again, wall), "cpu_ratio": ratio(again, cpu)},
        "seconds": {name: float(np.median(times)) for name, times in wall.items()},
    }


def timed(work: Work) -> tuple[float, float]:
    """Run `work` and return (wall seconds, processor seconds of this process and of children that ended)."""
    wall, cpu = time.perf_counter(), _cpu()
    work()
    return time.perf_counter() - wall, _cpu() - cpu


def below(ratio: Mapping[str, float], bar: float) -> dict[str, Any]:
    """Say whether the whole interval lies below a bar."""
    return {"bar": bar, "met": ratio["high"] < bar}


def machine() -> dict[str, Any]:
    """Return where this was measured: processor, cores, load, versions, date and commit; no names of hosts."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "transformer-lens", "nnsight")},
        "commit": _commit(),
    }


def resident(process: int | str = "self") -> dict[str, int]:
    """Return bytes of a process in memory: anonymous, and backed by files (mapped weights)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"anonymous": int(values["RssAnon"]) * 1024, "file": int(values["RssFile"]) * 1024}


def tell(benchmark: str, result: Mapping[str, Any]) -> None:
    """Print the one JSON object of a benchmark."""
    print(json.dumps({"benchmark": benchmark, **result, "command": command(benchmark), "machine": machine()}, indent=1))


def command(benchmark: str) -> str:
    """Return how this benchmark was called, without places."""
    return " ".join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])


def _cpu() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).parent
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or None
