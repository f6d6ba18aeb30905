"""What the effects presuppose: the unchanged organism thinks for varying times, and the two spans see one direction."""

from __future__ import annotations

import numpy as np
import pytest

from tests.effects.lab import SPANS, Lab

pytestmark = pytest.mark.effects


def test_lengths_differ_threefold_and_accuracy_leaves_room(lab: Lab) -> None:
    replies = lab.plain
    low, high = np.quantile([trace.thought_length for trace in replies.traces], [0.1, 0.9])
    assert high / low >= 3
    accuracy = replies.mean(replies.correct).value
    assert accuracy is not None
    assert 0.6 <= accuracy <= 0.85
    assert (replies.mean(replies.closed).value or 0) >= 0.98


def test_short_thoughts_are_less_accurate_on_equally_hard_questions(lab: Lab) -> None:
    """Within each size of question."""
    replies = lab.plain
    for group in sorted({trace.group or "" for trace in replies.traces}):
        members = [trace for trace in replies.traces if trace.group == group]
        right = {
            short: [bool(trace.correct) for trace in members if replies.short(trace) == short] for short in (0.0, 1.0)
        }
        assert len(right[1.0]) >= 10
        assert np.mean(right[0.0]) - np.mean(right[1.0]) > 0.2


@pytest.mark.parametrize("span", SPANS)
def test_halves_of_the_fit_questions_agree(lab: Lab, span: str) -> None:
    direction = lab.direction(span)
    halves = direction.provenance["options"]["split_half"]
    used = [halves["mean"][halves["layers"].index(layer)] for layer in lab.card["steering"]["layers"]]
    assert min(used) > 0.8
    stability = lab.scores(span).stability
    assert stability is not None
    assert stability > 0.7


def test_both_spans_point_the_same_way(lab: Lab) -> None:
    """Far from what two unrelated directions of this width would do (a cosine of about 0.09)."""
    one, other = (lab.direction(span) for span in SPANS)
    cosines = one.cosine(other)
    assert all(cosines[layer] > 0.3 for layer in lab.card["steering"]["layers"])
