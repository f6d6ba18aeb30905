"""Lanes: chosen by name, counted at the end, and one that cannot run says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import conftest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_plain(): pass

@pytest.mark.effects
def test_effect(): pass

@pytest.mark.oracle
def test_oracle(): pass

@pytest.mark.real
def test_real(): pytest.skip("the wheel could not be had")

@pytest.mark.faults
def test_fault(): assert False
"""


@pytest.fixture
def session(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lanes = "\n".join(f"    {lane}: x" for lane in conftest.LANES[1:])
    pytester.makeini(f"[pytest]\nmarkers =\n{lanes}\n")
    pytester.makepyfile(TESTS)
    return lambda *options: pytester.runpytest_subprocess("-p", "tests.conftest", *options)


def test_every_lane_is_counted_with_its_reasons(session):
    done = session("-n", "2")
    done.assert_outcomes(passed=3, skipped=1, failed=1)
    done.stdout.fnmatch_lines_random(
        [
            "unit     1 passed",
            "effects  1 passed",
            "oracle   1 passed",
            "real     1 skipped",
            "*1 skipped: the wheel could not be had",
            "faults   1 failed",
            "browser  nothing chosen",
            "vllm     nothing chosen",
        ]
    )


def test_lanes_are_chosen_by_name_and_not_by_folder(session, pytester):
    (pytester.mkdir("real") / "test_inside.py").write_text("def test_inside(): pass\n")
    session("--lane", "unit,oracle").assert_outcomes(passed=3, deselected=3)


def test_an_unknown_lane_is_refused():
    class Config:
        def getoption(self, name: str) -> str:
            return "unit,fast"

    with pytest.raises(pytest.UsageError, match="no lane fast"):
        conftest.pytest_collection_modifyitems(Config(), [])


def test_a_lane_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(conftest, "find_spec", lambda name: None)
    monkeypatch.setattr(conftest, "which", lambda name: None)
    assert "transformer-lens" in conftest.obstacle("oracle")
    monkeypatch.setattr(conftest, "ROOT", Path("/nowhere"))
    assert "browser" in conftest.obstacle("browser")
    assert "make vllm" in conftest.obstacle("vllm")
    assert conftest.obstacle("unit") is None
