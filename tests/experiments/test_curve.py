import numpy as np
import pytest

from experiments.curve import Curve, steering_curve, steering_for
from steer.directions import Direction
from tests.experiments.made import run

AT = (-1.0, 0.0, 0.5)


def curve(rng, slope, questions=50, name="v"):
    lengths = [[int(rng.integers(10, 40) + slope * (at + 1)) for _ in range(questions)] for at in AT]
    return Curve(name, AT, tuple(run(row, [True] * questions) for row in lengths)), np.array(lengths, dtype=float)


def test_the_slope_is_the_line_through_the_means():
    made, lengths = curve(np.random.default_rng(0), 20)
    found = made.slope()
    assert found.value == pytest.approx(np.polyfit(AT, lengths.mean(1), 1)[0])
    assert found.low < found.value < found.high


def test_the_interval_of_the_slope_is_that_of_a_naive_bootstrap():
    made, lengths = curve(np.random.default_rng(1), 5)
    rng = np.random.default_rng(2)
    drawn = [np.polyfit(AT, lengths[:, rng.integers(50, size=50)].mean(1), 1)[0] for _ in range(3000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = made.slope()
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))


def test_a_control_that_does_as_well_takes_the_slope_away():
    rng = np.random.default_rng(3)
    made, _ = curve(rng, 20)
    flat, _ = curve(rng, 0)
    assert made.slope_beyond([made]).value == 0.0
    beyond = made.slope_beyond([flat])
    assert beyond.value == pytest.approx(made.slope().value - flat.slope().value) and beyond.low > 0


def test_the_ratio_is_of_the_two_ends():
    made, lengths = curve(np.random.default_rng(4), 20)
    assert made.ratio().value == pytest.approx(lengths[-1].mean() / lengths[0].mean())


def test_every_point_is_asked_for_once_and_zero_is_not_run(organism):
    direction = Direction(organism.parameter("attention_output", 0).detach()[:2] * 0 + 1.0, (2, 3), "resid_mid")
    steering = steering_for(direction, "attn_out", (3,), "push")
    asked = []

    def evaluate(view, name):
        asked.append((name, view.changes))
        return run([10], [True])

    plain = run([20], [False])
    found = steering_curve(organism, steering, (0.5, -1.0, 0.0), plain, evaluate)
    assert [name for name, _ in asked] == ["push-1", "push+0.5"]
    assert [changes for _, changes in asked] == [((steering, -1.0),), ((steering, 0.5),)]
    assert found.coefficients == (-1.0, 0.0, 0.5) and found.runs[1] is plain
    assert found.lengths == [10.0, 20.0, 10.0] and found.accuracies == [1.0, 0.0, 1.0]
    assert steering.interventions[0].active_layers == (3,)
