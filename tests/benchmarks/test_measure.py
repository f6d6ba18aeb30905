"""The ruler: ratios of known works come out, intervals cover, the control is one, and a slower thing is seen as slower."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.measure import below, bootstrap, compare, machine, resident, tell


class Clock:
    """A clock that only works move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    monkeypatch.setattr(measure, "_cpu", clock)
    return clock


def work(clock, seconds):
    def run():
        clock.now += seconds() if callable(seconds) else seconds

    return run


def test_exact_times_give_the_exact_ratio(clock):
    found = compare({"plain": work(clock, 2.0), "ours": work(clock, 3.0)}, "plain", pairs=15)
    assert found["ratio"]["ours"] == pytest.approx({"median": 1.5, "low": 1.5, "high": 1.5})
    assert found["control"]["ratio"] == pytest.approx({"median": 1.0, "low": 1.0, "high": 1.0})
    assert found["seconds"] == pytest.approx({"plain": 2.0, "ours": 3.0, "plain again": 2.0})
    assert found["pairs"] == 15 and found["reference"] == "plain"


def test_pairing_removes_a_drift_that_means_would_show(clock):
    """Every round is slower than the one before; what is compared within a round does not mind."""
    runs = iter(range(10_000))

    def drifting(factor):
        return work(clock, lambda: factor * 1.2 ** (next(runs) // 3))

    found = compare({"plain": drifting(1.0), "ours": drifting(1.1)}, "plain", pairs=15)
    assert found["ratio"]["ours"]["median"] == pytest.approx(1.1)


def test_the_order_within_a_round_changes():
    seen: list[str] = []
    compare({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, "a", pairs=20, warmups=0)
    rounds = {"".join(seen[start : start + 3]) for start in range(0, len(seen), 3)}
    assert rounds == {"aab", "aba", "baa"}


def test_warm_up_rounds_are_not_counted(clock):
    times = iter([100.0, 100.0, 100.0, *[1.0] * 300])
    found = compare({"a": work(clock, lambda: next(times)), "b": work(clock, lambda: next(times))}, "a", warmups=1)
    assert found["seconds"]["a"] == found["seconds"]["b"] == 1.0


def test_the_interval_covers_the_true_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap(np.exp(random.normal(math.log(1.05), 0.05, size=25)), trial)
        covered += found.low <= 1.05 <= found.high
    assert 180 <= covered <= 200


def test_the_interval_narrows_with_more_pairs_and_holds_the_median():
    random = np.random.default_rng(1)
    few, many = (bootstrap(random.normal(1, 0.1, size=n)) for n in (10, 1000))
    assert few.low <= few.median <= few.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_a_bar_is_met_by_the_bound_and_not_by_the_middle():
    assert below({"median": 1.0, "low": 0.9, "high": 1.09}, 1.1)["met"]
    assert not below({"median": 1.0, "low": 0.9, "high": 1.11}, 1.1)["met"]


def test_the_machine_names_no_host_and_no_place():
    import getpass
    import socket

    text = json.dumps(machine())
    assert socket.gethostname() not in text and f"/{getpass.getuser()}" not in text
    assert machine()["cores"] >= 1 and machine()["versions"]["torch"]


def test_resident_memory_sees_what_is_held():
    before = resident()["anonymous"]
    held = np.ones(40_000_000)
    assert resident()["anonymous"] - before > 300_000_000
    assert held[-1] == 1


def test_a_result_is_one_json_object_with_its_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/place/startup.py", "--pairs", "3"])
    tell("startup", {"value": 1})
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "python -m benchmarks.startup --pairs 3" and found["value"] == 1
    assert set(found) == {"benchmark", "value", "command", "machine"}
