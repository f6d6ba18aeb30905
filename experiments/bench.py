"""What both demos stand on: a folder of their own, one thread, evaluations whose progress is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.evaluate import evaluate
from experiments.run import Run
from steer.errors import SteerError
from steer.files import write_text
from steer.generation import Progress, Sampling

if TYPE_CHECKING:
    from steer.model import SteerableModel

RESULT, MARK = "result.json", "demo.yaml"
PLAIN = "baseline"
Tell = Callable[[str, int, int, str], None]
"""Called with (what is done now, steps done, steps in all, tokens per second or nothing)."""


@dataclass
class Bench:
    """Where runs go, how replies are sampled, and what is told meanwhile.

    Attributes:
        out: the folder of the demo.
        sampling: of every evaluation.
        seed: of the sampling.
        questions: how many an evaluation asks unless told otherwise.
        steps: how many there will be.
        tell: called at the beginning of each and as it goes on.
        done: steps that are finished.
    """

    out: Path
    sampling: Sampling
    seed: int
    questions: int
    steps: int
    tell: Tell
    done: int = 0

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Count what happens inside as one step."""
        self.tell(label, self.done, self.steps, "")
        yield
        self.done += 1

    def evaluate(self, model: SteerableModel, name: str, task: str = "chain", limit: int = 0, samples: int = 1) -> Run:
        """Evaluate into the folder `runs/name`; a limit of 0 asks `questions`."""
        with self.step(name):

            def moved(state: Progress) -> None:
                self.tell(name, self.done, self.steps, f"{state.tokens_per_second:.0f} tokens/s")

            return evaluate(
                model,
                task,
                out=self.out / "runs" / name,
                sampling=self.sampling,
                samples=samples,
                seed=self.seed,
                limit=limit or self.questions,
                progress=moved,
            )

    def report(self) -> None:
        """Tell that everything is measured."""
        self.tell("report", self.steps, self.steps, "")


def refuse_existing(out: Path) -> None:
    """Refuse a folder that is there.

    Raises:
        SteerError: it is.
    """
    if out.exists():
        raise SteerError(
            f"{out} exists already", "a folder that does not exist yet", "Choose another --out, or remove it"
        )


def own_folder(out: Path, model: str, seed: int) -> None:
    """Make the folder of a demo, with the mark by which `clear_own` knows it again."""
    out.mkdir(parents=True)
    write_text(out / MARK, f"made_by: steer demo\nmodel: {model}\nseed: {seed}\n")


def clear_own(folder: Path) -> None:
    """Remove a folder that a demo made; leave one that does not exist.

    Raises:
        SteerError: something else is there.
    """
    if not folder.exists():
        return
    mark = folder / MARK
    if not mark.is_file() or not mark.read_text("utf-8").startswith("made_by: steer demo\n"):
        raise SteerError(
            f"the folder {folder} exists and was not made by the demo",
            "no such folder, or the one of an earlier demo, which is replaced",
            "Remove it, or choose another with --out",
        )
    shutil.rmtree(folder)
