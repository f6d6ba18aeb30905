"""The laboratory of the effects lane: the bundled organism, its card, and every run that more than one test reads.

Everything goes through the toolkit's own interface: `evaluate`, `collect`, `length_direction`, `head_scores`, `Add`,
`thinkedit`. Directions and heads come from fit questions, everything measured from test questions, which share none.
Layers, coefficients and the number of heads stand in the organism's card and are not chosen here.

Each question is asked SAMPLES times; the streams are keyed by (seed, question, sample), so they are independent, and the
same questions are asked before and after a change. Intervals are paired bootstraps over questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

import probes
import steer
from edits.thinkedit import thinkedit
from experiments.evaluate import evaluate
from experiments.run import Run
from experiments.summary import Replies
from steer import Add, Direction, HeadScores, Patch, Sampling, SteerableModel, Steering
from steer.intervals import Interval, Statistic, bootstrap, paired, slope_of

QUESTIONS, FIT_QUESTIONS, SAMPLES, FIT_SAMPLES = 120, 400, 5, 2
SLUGS = {"predicts_thinking": "predicts_thinking", "marker:;": "marker"}
SPANS = tuple(SLUGS)
RANDOM_DIRECTIONS = (11, 12, 13)
RANDOM_HEADS = (21, 22, 23)
RANDOM_EDIT_DIRECTIONS = (21, 22)
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")
PERCENTILES = (20.0, 80.0)
CHANCE = 0.1


def asked(card: dict[str, Any], verb: str, span: str) -> dict[str, Any]:
    """Return what the card says of `steering` or `thinkedit` with a span."""
    told: dict[str, Any] = next(entry for entry in (card[verb], card[f"{verb}_matched"]) if entry["span"] == span)
    return told


@dataclass(frozen=True)
class Lab:
    """Runs and probes of an organism, each made once.

    Attributes:
        folder: for run folders; absolute, and no checkout.
        organism: its name; layers, coefficients and heads are asked of `chain` alone.
        runs: by name, those that were made.

    Raises:
        ValueError: the folder is relative to wherever the tests were started, or a checkout of this repository.
    """

    folder: Path
    organism: str = "chain"
    runs: dict[str, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_absolute() or (self.folder / "pyproject.toml").exists():
            raise ValueError(f"runs of the effects lane belong in a temporary folder, not in {self.folder}")

    @cached_property
    def model(self) -> SteerableModel:
        """The specimen."""
        return steer.load(f"organism:{self.organism}")

    @property
    def card(self) -> dict[str, Any]:
        """What its card says."""
        assert self.model.card is not None
        return self.model.card

    def ask(
        self, name: str, model: SteerableModel, task: str = "chain", questions: int = QUESTIONS, samples: int = SAMPLES
    ) -> Run:
        """Evaluate once under a name; asked again, return the same run.

        Raises:
            ValueError: a name that is no plain file name.
        """
        if RUN_NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} names a run; use small letters, digits and _ . + - alone")
        if name not in self.runs:
            sampling = Sampling(temperature=self.card["temperature"], max_new_tokens=self.card["max_new_tokens"])
            with FileLock(self.folder / f"{name}.lock"):  # Another worker may be making it, or have made it.
                self.runs[name] = evaluate(
                    model,
                    task,
                    out=self.folder / name,
                    limit=questions,
                    samples=samples,
                    sampling=sampling,
                    seed=0,
                    batch_size=256,
                    resume=True,
                )
        return self.runs[name]

    @cached_property
    def summary(self) -> probes.Summary:
        """Means over both spans of replies to fit questions."""
        fit = self.ask("fit", self.model, "chain:fit", FIT_QUESTIONS, FIT_SAMPLES)
        return probes.collect(self.model, fit.traces, spans=SPANS)

    def direction(self, span: str) -> Direction:
        """The length direction, within groups of equal size."""
        return probes.length_direction(self.summary, span=span, percentiles=PERCENTILES, by_group=True)

    def scores(self, span: str) -> HeadScores:
        """Head scores of that direction."""
        return probes.head_scores(self.summary, self.direction(span), self.model, permutations=0)

    @cached_property
    def plain(self) -> Replies:
        """The unchanged model."""
        return self.ask("plain", self.model).replies

    # Steering.

    def coefficients(self, span: str) -> tuple[float, ...]:
        """The card's grid."""
        return tuple(asked(self.card, "steering", span)["coefficients"])

    def steered(self, span: str, coefficient: float, seed: int | None = None) -> Replies:
        """The model with the direction, or with a random one of equal norm, added in the card's layers."""
        if coefficient == 0:
            return self.plain
        told = asked(self.card, "steering", span)
        direction = self.direction(span).only(told["layers"])
        direction = direction if seed is None else direction.random_like(seed)
        kind = "" if seed is None else f"-random-{seed}"
        steering = Steering((Add(direction, told["site"], coefficient),), self.model.identity, "length")
        return self.ask(f"steered-{SLUGS[span]}-{coefficient:+g}{kind}", self.model.with_(steering)).replies

    def slope(self, span: str, coefficients: Sequence[float], seed: int | None = None) -> Interval:
        """Tokens of thought per unit of coefficient."""
        return bootstrap(self.slope_statistic(span, coefficients, seed), QUESTIONS)

    def slope_statistic(self, span: str, coefficients: Sequence[float], seed: int | None = None) -> Statistic:
        """The slope for drawn questions."""
        points = [self.steered(span, coefficient, seed) for coefficient in coefficients]
        return slope_of([point.statistic(lambda trace: float(trace.thought_length)) for point in points], coefficients)

    # ThinkEdit.

    def heads(self, span: str) -> tuple[tuple[int, int], ...]:
        """The best heads, as many as the card says."""
        return self.scores(span).top(asked(self.card, "thinkedit", span)["heads"])

    def edited(self, span: str, kind: str = "thinkedit", seed: int = 0) -> Replies:
        """The model under ThinkEdit, or under the control `random heads` or `random direction`."""
        direction, heads = self.direction(span), self.heads(span)
        if kind == "random heads":
            heads = self.scores(span).random(len(heads), seed, exclude=heads)
        if kind == "random direction":
            direction = direction.random_like(seed)
        patch: Patch = thinkedit(direction, heads, model=self.model)
        return self.ask(f"{kind.replace(' ', '-')}-{SLUGS[span]}-{seed}", self.model.with_(patch)).replies


def change(before: Statistic, after: Statistic) -> Interval:
    """Interval of after - before over the same questions."""
    return paired(before, after, QUESTIONS)


def average(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics of the same questions, such as several draws of a control."""
    return lambda drawn: np.mean([statistic(drawn) for statistic in statistics], axis=0)
