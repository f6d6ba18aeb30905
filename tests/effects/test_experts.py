"""Scores of experts find the two that were planted, scaling them does what it was planted to do, and the twin answers to nothing.

The bands are wider than what the cards measured (200 questions, 5 seeds): here are fewer replies. Up to a factor of 4,
since larger ones break the arithmetic whatever is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

import probes
from experiments.summary import Replies
from probes.experts import expert_scores, recorder_for
from steer import ExpertScores, ScaleExperts, Steering
from steer.expert_interventions import Expert
from steer.intervals import Interval, paired
from steer.trace import Trace
from tests.effects.lab import Lab

pytestmark = pytest.mark.effects
QUESTIONS, SAMPLES, FIT_QUESTIONS = 64, 4, 64
MARKERS = {"<think>": 1.0}
CONTROLS = ("equal load", "random")


class Mixture:
    """A mixture of experts: its scores, and its replies with some experts scaled."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.changes = cache(self._changes)
        self.scores = cache(self._scores)

    @property
    def planted(self) -> tuple[Expert, ...]:
        """What the card says was planted."""
        told = self.lab.card["planted"]
        return tuple((layer, expert) for layer, expert in told["experts"]) if told else ()

    def _scores(self) -> ExpertScores:
        """On fit questions; with prompts, as RICE counts."""
        fit = self.lab.ask("fit", self.lab.model, "chain:fit", FIT_QUESTIONS, 1)
        summary = probes.collect(self.lab.model, fit.traces, recorders=[recorder_for(MARKERS)])
        return expert_scores(summary, MARKERS, resamples=0, model=self.lab.model)

    def pair(self, kind: str) -> tuple[Expert, ...]:
        """The two experts that rank first, or two controls."""
        first = self.scores().top(2)
        if kind == "first":
            return first
        return self.scores().matched(first, 0, first) if kind == "equal load" else self.scores().random(2, 1, first)

    def replies(self, experts: Sequence[Expert], beta: float) -> Replies:
        """To test questions."""
        if beta == 1:
            return self.lab.ask("plain", self.lab.model, "chain", QUESTIONS, SAMPLES).replies
        steering = Steering((ScaleExperts(tuple(experts), beta),), self.lab.model.identity, "experts")
        name = "-".join(f"{layer}.{expert}" for layer, expert in experts) + f"-{beta:g}"
        return self.lab.ask(name, self.lab.model.with_(steering), "chain", QUESTIONS, SAMPLES).replies

    def _changes(self, kind: str, beta: float) -> dict[str, Interval]:
        """Of accuracy, and of length relative to nothing scaled, over the same questions."""
        before, after = self.replies((), 1), self.replies(self.pair(kind), beta)
        pairs = {
            "accuracy": (before.statistic(before.correct), after.statistic(after.correct)),
            "length": (before.statistic(length), after.statistic(length)),
        }
        return {name: paired(one, other, QUESTIONS) for name, (one, other) in pairs.items()}


def length(trace: Trace) -> float:
    """Thinking tokens."""
    return float(trace.thought_length)


@pytest.fixture(scope="module")
def planted(shared_folder: Callable[[str], Path]) -> Mixture:
    return Mixture(Lab(shared_folder("moe"), "chain-moe"))


@pytest.fixture(scope="module")
def twin(shared_folder: Callable[[str], Path]) -> Mixture:
    return Mixture(Lab(shared_folder("moe-plain"), "chain-moe-plain"))


def test_scores_find_the_planted_experts_and_no_others(planted: Mixture) -> None:
    scores = planted.scores()
    assert set(scores.top(2)) == set(planted.planted)
    assert min(scores[expert] for expert in planted.planted) > 0.95
    following = scores.top(3)[-1]
    assert scores[following] < 0.8, f"{following} scores {scores[following]:.2f}"


def test_the_twin_has_no_expert_of_the_mark_alone(twin: Mixture) -> None:
    assert twin.planted == ()
    assert twin.scores()[twin.scores().top(1)[0]] < 0.8


def test_scaled_up_the_planted_experts_lengthen_thoughts_and_raise_accuracy(planted: Mixture) -> None:
    found = planted.changes("first", 4)
    assert (found["accuracy"].low or 0) > 0.03, found["accuracy"]
    assert (found["length"].low or 0) > 6, found["length"]


def test_scaled_down_they_shorten_thoughts_and_lower_accuracy(planted: Mixture) -> None:
    found = planted.changes("first", 0.25)
    assert (found["accuracy"].high or 0) < -0.03, found["accuracy"]
    assert (found["length"].high or 0) < -2, found["length"]


@pytest.mark.parametrize("kind", CONTROLS)
def test_other_experts_do_less(planted: Mixture, kind: str) -> None:
    """Of equal load and at random; their intervals end below where the planted ones' begin."""
    first, other = planted.changes("first", 4), planted.changes(kind, 4)
    assert set(planted.pair(kind)).isdisjoint(planted.planted)
    assert (first["accuracy"].low or 0) > (other["accuracy"].value or 0) + 0.02, f"{first} against {other}"
    assert (first["length"].low or 0) > (other["length"].high or 0), f"{first} against {other}"


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_nothing_answers_in_the_twin(twin: Mixture, beta: float) -> None:
    """The experts that rank first in the same training without planting: within the noise of these replies."""
    found = twin.changes("first", beta)
    assert abs(found["accuracy"].value or 0) < 0.07, found["accuracy"]
    assert abs(found["length"].value or 0) < 4, found["length"]


def test_the_plain_mixtures_think_like_their_parent(planted: Mixture, twin: Mixture) -> None:
    for mixture in (planted, twin):
        replies = mixture.replies((), 1)
        accuracy, closed = (replies.mean(figure).value or 0 for figure in (replies.correct, replies.closed))
        assert 0.6 <= accuracy <= 0.85 and closed >= 0.98
