"""ThinkEdit: fewer short thoughts, and better ones; more so than with random heads or a random direction.

Random heads are not all idle in this specimen (docs/organism.md says which and why), so the edit is compared with the
mean of several draws and not with nothing.
"""

from __future__ import annotations

import pytest

from tests.effects.lab import RANDOM_EDIT_DIRECTIONS, RANDOM_HEADS, SPANS, Lab, average, change

pytestmark = pytest.mark.effects


@pytest.mark.parametrize("span", SPANS)
def test_fewer_thoughts_are_short(lab: Lab, span: str) -> None:
    before, after = lab.plain, lab.edited(span)
    found = change(before.statistic(before.short), after.statistic(after.short))
    assert found.high is not None
    assert found.high < 0, f"share of short thoughts changes by {found}"
    assert found.value is not None
    assert found.value <= -0.10, f"share of short thoughts changes by {found}"


def test_fewer_are_short_than_with_random_heads(lab: Lab) -> None:
    controls = [lab.edited(SPANS[0], "random heads", seed) for seed in RANDOM_HEADS]
    after = lab.edited(SPANS[0])
    found = change(average([control.statistic(control.short) for control in controls]), after.statistic(after.short))
    assert found.high is not None
    assert found.high < 0, f"share of short thoughts differs by {found}"


@pytest.mark.parametrize("span", SPANS)
def test_the_shortest_fifth_gets_better(lab: Lab, span: str) -> None:
    found = change(lab.plain.shortest(0.0, 0.2), lab.edited(span).shortest(0.0, 0.2))
    assert found.low is not None
    assert found.low > 0, f"accuracy of the shortest fifth changes by {found}"


def test_it_gets_better_than_with_random_heads(lab: Lab) -> None:
    controls = [lab.edited(SPANS[0], "random heads", seed).shortest(0.0, 0.2) for seed in RANDOM_HEADS]
    found = change(average(controls), lab.edited(SPANS[0]).shortest(0.0, 0.2))
    assert found.low is not None
    assert found.low > 0, f"accuracy of the shortest fifth differs by {found}"


def test_it_gets_better_than_with_a_random_direction(lab: Lab) -> None:
    draws = RANDOM_EDIT_DIRECTIONS
    controls = [lab.edited(SPANS[0], "random direction", seed).shortest(0.0, 0.2) for seed in draws]
    found = change(average(controls), lab.edited(SPANS[0]).shortest(0.0, 0.2))
    assert found.low is not None
    assert found.low > 0, f"accuracy of the shortest fifth differs by {found}"


@pytest.mark.parametrize("span", SPANS)
def test_thoughts_still_close_and_more_answers_are_right(lab: Lab, span: str) -> None:
    before, after = lab.plain, lab.edited(span)
    assert (after.mean(after.closed).value or 0) >= 0.95
    found = change(before.statistic(before.correct), after.statistic(after.correct))
    assert found.low is not None and found.high is not None
    assert found.low > 0.05, f"accuracy changes by {found}"
    assert found.high >= 0.10, f"accuracy changes by {found}"  # The card, on 200 questions, says +.135 [.099, .171].
