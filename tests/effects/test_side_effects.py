"""What the length steering does beside the length, next to random directions of equal norm, on the organism.

The card's layers, site and ends of the grid; controls by the seeds of the lane; intervals over questions. What a random
direction does as well is no effect of the steering and is not claimed.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import probes
from probes.effects.compare import Beyond, Comparison
from probes.effects.result import OWN_TRACES, PLAIN_TRACES, REPLIES
from steer import Add, Steering
from steer.trace import Trace
from tests.effects.lab import RANDOM_DIRECTIONS, SPANS, Lab, asked

pytestmark = pytest.mark.effects
SPAN = SPANS[0]
SHORTER, LONGER = "shorter", "longer"
SAMPLES_READ = 3
"""Of the lane's replies to each question: every one is read by eight models, and intervals are over questions."""


def some(traces: Iterable[Trace]) -> list[Trace]:
    """The first replies to every question."""
    return [trace for trace in traces if trace.sample < SAMPLES_READ]


@pytest.fixture(scope="module")
def comparison(lab: Lab) -> Comparison:
    """Both ends of the card's grid with their controls, on the replies that the other tests of the lane made."""
    told = asked(lab.card, "steering", SPAN)
    grid = lab.coefficients(SPAN)
    steering = Steering((Add(lab.direction(SPAN).only(told["layers"]), told["site"]),), lab.model.identity)
    ends = {SHORTER: grid[0], LONGER: grid[-1]}

    def ask(name: str, view: object) -> list[Trace]:
        steering, _, control = name.partition(", random ")
        return some(lab.steered(SPAN, ends[steering], int(control) if control else None).traces)

    steerings = {name: (steering, coefficient) for name, coefficient in ends.items()}
    return probes.compare(lab.model, steerings, some(lab.plain.traces), ask, controls=RANDOM_DIRECTIONS)


def beyond(found: Comparison, name: str, quantity: str, part: str = "thinking", on: str = PLAIN_TRACES) -> Beyond:
    """One line of what is beyond the controls."""
    return next(
        each for each in found.beyond if (each.name, each.on, each.part, each.quantity) == (name, on, part, quantity)
    )


@pytest.mark.parametrize("name", [SHORTER, LONGER])
def test_the_thought_changes_more_than_under_random_directions(comparison: Comparison, name: str) -> None:
    """Over the thought, on the plain model's tokens and on its own."""
    for on in (PLAIN_TRACES, OWN_TRACES):
        found = beyond(comparison, name, "kl", on=on)
        assert found.beyond.low is not None
        assert found.beyond.low > 0, f"{found}"


@pytest.mark.parametrize(("name", "sign"), [(SHORTER, -1), (LONGER, 1)])
def test_length_and_accuracy_follow_beyond_random_directions(comparison: Comparison, name: str, sign: int) -> None:
    """Both follow the coefficient; the interval of what is beyond the controls leaves zero out."""
    for quantity in ("thinking_tokens", "accuracy"):
        found = beyond(comparison, name, quantity, "reply", REPLIES).beyond
        assert found.low is not None
        assert found.high is not None
        assert min(sign * found.low, sign * found.high) > 0, f"{quantity}: {found}"


@pytest.mark.parametrize("name", [SHORTER, LONGER])
def test_behind_the_same_thought_the_right_answer_stays_as_likely(comparison: Comparison, name: str) -> None:
    """So accuracy moves because the thought does, and not because the answer is read off it in another way."""
    behind = comparison[name].measure("p_gold", "answer").difference
    replied = comparison[name].measure("accuracy", "reply", REPLIES).difference
    assert behind.low is not None and behind.high is not None and replied.value is not None
    assert max(abs(behind.low), abs(behind.high)) < 0.02 < abs(replied.value), f"{behind} against {replied}"


@pytest.mark.parametrize("name", [SHORTER, LONGER])
def test_thoughts_close_and_loops_stay_rare(comparison: Comparison, name: str) -> None:
    """At the long end a few replies do loop, which no control does; it is told in the docs and bounded here."""
    assert (comparison[name].measure("closed", "reply", REPLIES).steered.low or 0) >= 0.95
    assert (comparison[name].measure("loops", "reply", REPLIES).steered.high or 0) <= 0.05


@pytest.mark.parametrize("name", [SHORTER, LONGER])
def test_the_first_token_tells_nothing_of_the_thought(comparison: Comparison, name: str) -> None:
    """Where arXiv 2504.19483 measures, this model always writes its opening mark."""
    first, thinking = (comparison[name].measure("kl", part).steered for part in ("first token", "thinking"))
    assert first.value is not None and thinking.value is not None
    assert first.value < thinking.value / 100


def test_without_strength_nothing_happens(lab: Lab) -> None:
    told = asked(lab.card, "steering", SPAN)
    steering = Steering((Add(lab.direction(SPAN).only(told["layers"]), told["site"]),), lab.model.identity)
    found = probes.effects(lab.model, steering, lab.plain.traces[:50], coefficient=0.0)
    assert {row.largest_kl for row in found.traces} == {0.0}
    assert {measure.difference.value for measure in found.measures} == {0.0}
