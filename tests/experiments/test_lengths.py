import numpy as np
import pytest

from experiments.lengths import FIFTHS, accuracy_between, length_of
from steer.marks import Marks
from steer.trace import Trace

MARKS = Marks(((3,),), ((4,),))


def trace(prompt=2, completion=10, **fields):
    return Trace("a/0", "a", 0, "p", tuple(range(10, 10 + prompt)), tuple(range(20, 20 + completion)), **fields)


def test_length_is_the_finished_thought():
    closed = trace(thinking_span=(2, 9), closed=True, thinking_tokens=7)
    open_ = trace(thinking_span=(2, 12), closed=False, thinking_tokens=10)
    assert length_of(closed, MARKS) == 7
    assert length_of(open_, MARKS) is None
    assert length_of(trace(answer_span=(5, 6)), MARKS) is None, "thinking was off"


def test_without_marks_it_is_what_stands_before_the_answer():
    assert length_of(trace(answer_span=(7, 8), finish_reason="stop"), Marks()) == 5
    assert length_of(trace(finish_reason="stop"), Marks()) is None
    assert length_of(trace(answer_span=(7, 8), finish_reason="length"), Marks()) is None


def naive(lengths, correct, low, high, rng, draws=4000):
    """The paper's rule, ties broken at random, many times."""
    kept = [(length, right) for length, right in zip(lengths, correct, strict=True) if length is not None]
    first, last = int(np.floor(low * len(kept) + 1e-9)), int(np.floor(high * len(kept) + 1e-9))
    means = []
    for _ in range(draws):
        order = sorted(range(len(kept)), key=lambda place: (kept[place][0], rng.random()))
        means.append(np.mean([kept[place][1] for place in order[first:last]]))
    return float(np.mean(means))


@pytest.mark.parametrize("window", [(0.0, 0.05), (0.0, 0.1), (0.0, 0.2), *FIFTHS])
def test_shares_of_the_order_by_length(window):
    rng = np.random.default_rng(0)
    lengths = [None if rng.random() < 0.1 else int(rng.integers(2, 9)) for _ in range(60)]
    correct = [bool(rng.random() < 0.5) for _ in lengths]
    found = accuracy_between([(lengths, correct)], *window)(np.ones((1, 60)))[0]
    assert found == pytest.approx(naive(lengths, correct, *window, rng), abs=0.03)


def test_without_ties_it_is_exact():
    lengths, correct = [5, 1, 9, 3, 7], [True, False, True, True, False]
    assert accuracy_between([(lengths, correct)], 0, 0.4)(np.ones((1, 5)))[0] == 0.5
    assert accuracy_between([(lengths, correct)], 0.6, 1)(np.ones((1, 5)))[0] == 0.5
    assert np.isnan(accuracy_between([(lengths, correct)], 0, 0.1)(np.ones((1, 5)))[0]), "floor(0.5) replies"


def test_a_question_drawn_twice_counts_twice():
    lengths, correct = [1, 2, 3, 4], [False, True, True, True]
    drawn = np.array([[2.0, 1, 1, 0]])
    assert accuracy_between([(lengths, correct)], 0, 0.5)(drawn)[0] == 0.0
    assert accuracy_between([(lengths, correct)], 0, 0.75)(drawn)[0] == pytest.approx(1 / 3)


def test_runs_are_averaged_after_each_was_cut():
    runs = [([1, 2, 3, 4], [True, True, False, False]), ([40, 30, 20, 10], [True, True, False, False])]
    assert accuracy_between(runs, 0, 0.5)(np.ones((1, 4)))[0] == 0.5


def test_no_lengths_at_all():
    assert np.isnan(accuracy_between([([None, None], [True, False])], 0, 1)(np.ones((1, 2)))[0])
