"""Editing checkpoints against what cannot be avoided: `python -m benchmarks.edits`.

DESIGN §7, rows "patch a checkpoint" and "three-checkpoint arithmetic". All contestants work on the same synthetic files in
the same run, interleaved in an order drawn anew for each round; the reference runs twice, for the A/A control. What is
compared is the slope between two sizes, which leaves the fixed costs out (headers, manifest, start-up); times at each
size are told beside it. Inputs lie in the page cache, which the first, uncounted round fills: three models of the larger
size and the output have to fit into memory. Slow contestants take part in every fifth round only. Anonymous memory is
sampled from outside, in a fresh process each.

    python -m benchmarks.edits                                     some minutes: 0.5 and 2 GB
    python -m benchmarks.edits --patch 2 8 --merge 1 4 --rounds 15          the sizes of the design page
    python -m benchmarks.edits --tiny                              20 MB, to see that everything runs
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import below, bootstrap, tell
from benchmarks.synthetic import SMALL, Shape, make, recipe_for, size_of
from benchmarks.worker import ORACLE, Worker, command, memory

AGAIN = " again"
Pair = tuple[float, float]
Times = dict[str, dict[int, Pair]]
Cost = Callable[[Pair], float]


@dataclass(frozen=True)
class Contest:
    """One row of the design page.

    Attributes:
        name: what we do.
        reference: what it is divided by.
        others: told beside it; those in `slow` run in every fifth round.
        models: how many checkpoints go in.
        bar, target: for the slope.
    """

    name: str
    reference: str
    others: tuple[str, ...]
    slow: tuple[str, ...]
    models: int
    bar: float
    target: float


CONTESTS = (
    Contest("apply", "copy", ("copy, flushed behind", "load and save"), ("load and save",), 1, 1.25, 1.1),
    Contest("merge", "read and write", ("loop", "mergekit"), ("loop", "mergekit"), 3, 2.5, 1.6),
)


@dataclass(frozen=True)
class Bench:
    """Where and how one contest runs.

    Attributes:
        contest: which.
        sizes: the folders of the smaller and of the larger size.
        out: what is written, and removed.
        rounds: that are counted.
        every: slow contestants run in every so manieth round.
    """

    contest: Contest
    sizes: tuple[tuple[Path, ...], tuple[Path, ...]]
    out: Path
    rounds: int
    every: int

    def names(self) -> list[str]:
        """Contestants that can run here."""
        others = [name for name in self.contest.others if name != "mergekit" or ORACLE.is_file()]
        return [self.contest.name, self.contest.reference, self.contest.reference + AGAIN, *others]

    def request(self, work: str, folders: Sequence[Path]) -> dict[str, Any]:
        """What a worker is asked."""
        asked = {"work": work.removesuffix(AGAIN), "folders": [str(folder) for folder in folders], "out": str(self.out)}
        return asked | ({"recipe": recipe_for(list(folders))} if work == "mergekit" else {})

    def timed(self) -> Times:
        """Seconds at both sizes, per contestant, by number of round."""
        names = self.names()
        times: Times = {name: {} for name in names}
        order = random.Random(0)
        with ExitStack() as stack:
            ours = stack.enter_context(Worker(command("ours")))
            workers = dict.fromkeys(names, ours)
            if "mergekit" in names:
                workers["mergekit"] = stack.enter_context(Worker(command("mergekit")))
            for number in range(self.rounds + 1):
                for name in order.sample(names, len(names)):
                    if name in self.contest.slow and number and (number - 1) % self.every:
                        continue
                    small, large = (workers[name].ask(self.request(name, folders)) for folders in self.sizes)
                    if number:
                        times[name][number] = (small, large)
                sys.stderr.write(f"{self.contest.name}: round {number} of {self.rounds}\n")
        return times

    def result(self) -> dict[str, Any]:
        """Ratios to the reference with intervals, the control, seconds, and memory."""
        times = self.timed()
        found: dict[str, Any] = {"gigabytes": [size_of(folders[0]) / 1e9 for folders in self.sizes]}
        found |= {"models": self.contest.models, "rounds": self.rounds, "reference": self.contest.reference}
        found |= {kind: ratios(times, self.contest, cost) for kind, cost in COSTS.items()}
        found["seconds"] = {
            name: [float(np.median([pair[side] for pair in pairs.values()])) for side in (0, 1)]
            for name, pairs in times.items()
        }
        found |= {"target": self.contest.target, **below(found["slope"][self.contest.name], self.contest.bar)}
        if "mergekit" in self.contest.others and "mergekit" not in times:
            found |= {
                "mergekit": "left out: there is no .venv-oracle; `make oracle` makes it where the package can be had"
            }
        return found | {"memory": self.memory()}

    def memory(self) -> dict[str, Any]:
        """Anonymous memory of every contestant at both sizes, in bytes."""
        names = [name for name in self.names() if not name.endswith(AGAIN)]
        return {name: [self._memory(name, folders) for folders in self.sizes] for name in names}

    def _memory(self, name: str, folders: Sequence[Path]) -> dict[str, int]:
        return memory(name, self.request(name, folders))


COSTS: dict[str, Cost] = {
    "slope": lambda pair: pair[1] - pair[0],
    "small": lambda pair: pair[0],
    "large": lambda pair: pair[1],
}


def ratios(times: Times, contest: Contest, cost: Cost) -> dict[str, dict[str, float]]:
    """Every contestant against the reference of its own rounds, and the others against ours."""
    over = {name: (name, contest.reference) for name in times if name != contest.reference}
    over |= {f"{name} / {contest.name}": (name, contest.name) for name in contest.others if name in times}
    return {label: _ratio(times[above], times[under], cost) for label, (above, under) in over.items()}


def _ratio(above: Mapping[int, Pair], under: Mapping[int, Pair], cost: Cost) -> dict[str, float]:
    return vars(bootstrap([cost(pair) / cost(under[number]) for number, pair in above.items()]))


def held(contest: Contest, gigabytes: Sequence[float], shape: Shape, place: Path, options: argparse.Namespace) -> Any:
    """Make the files of a contest, hold it, and remove them.

    Raises:
        SystemExit: there is not enough room.
    """
    needed = 1e9 * (contest.models * sum(gigabytes) + max(gigabytes)) * 1.05
    free = shutil.disk_usage(place).free
    if needed > free:
        raise SystemExit(
            f"{contest.name}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} free; give smaller sizes"
        )
    with tempfile.TemporaryDirectory(dir=place) as name:
        small, large = (
            tuple(make(Path(name) / f"{size}-{seed}", size, shape, seed) for seed in range(contest.models))
            for size in gigabytes
        )
        return Bench(contest, (small, large), Path(name) / "out", options.rounds, options.slow_every).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"nargs": 2, "type": float, "metavar": ("SMALL", "LARGE"), "default": (0.5, 2.0)}
    parser.add_argument("--patch", **sizes, help="GB of the two checkpoints that are patched; 0 0 leaves this out")
    parser.add_argument("--merge", **sizes, help="GB of each of three models that are merged; 0 0 leaves this out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-every", type=int, default=5, help="slow contestants run in every so manieth round")
    parser.add_argument("--folder", type=Path, help="where to work; the temporary folder if not given")
    parser.add_argument(
        "--tiny", action="store_true", help="small matrices, for small sizes; 10 and 20 MB if none are given"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that scratch files are removed.
    place = options.folder or Path(tempfile.gettempdir())
    result = {}
    for contest, asked in zip(CONTESTS, (options.patch, options.merge), strict=True):
        tiny = options.tiny and tuple(asked) == (0.5, 2.0)
        gigabytes = (0.01, 0.02) if tiny else asked
        if any(gigabytes):
            result[contest.name] = held(contest, gigabytes, SMALL if options.tiny else Shape(), place, options)
    tell("edits", result)


if __name__ == "__main__":
    main()
