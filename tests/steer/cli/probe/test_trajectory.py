"""`steer probe trajectory`, from a run and from a summary, on a tiny model with made grades."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import probes
from probes.collect.segments import SegmentMeans
from probes.trajectory.result import Trajectory
from steer.cli import app
from steer.subjects import open_subject
from steer.traces import Traces
from tests.probes import made
from tests.steer.cli.probe.conftest import Call


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("qwen3")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Graded traces of twelve questions, three samples each."""
    traces = made.traces(12, samples=3)
    graded = [replace(trace, correct=number % 3 != 1, answer=str(number % 2)) for number, trace in enumerate(traces)]
    Traces(graded, traces.meta).save(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_gives_signals_areas_and_ways(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    told = steer("probe", "trajectory", model, "--from", run, "--out", out, "--every", 4, "--sequential", "net", "--sequential", "combined", "--early", 2, "--plot", picture)  # fmt: skip
    found = Trajectory.load(out)
    assert (told["traces"], told["every"], found.every) == (36, 4, 4)
    assert told["with_two_segments"] == sum(row.segments > 1 for row in found.rows)
    assert found.scale == pytest.approx(told["scale"])
    assert {row["signal"] for row in told["areas"]} == set(found.names) >= {"net", "margin", "entropy", "inverse_p1"}
    closed = [row.finished for row in found.rows]
    assert np.isfinite(found.scores("margin")).tolist() == closed, "the answer begins where a thought closed"
    assert [way["rows"][0]["way"] for way in told["ways"]] == ["net", "combined", "early"]
    assert "vote" in {row["way"] for row in told["ways"][0]["rows"]}, "the run says what was answered"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_summary_gives_the_same_signals_and_its_run_the_answers(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    opened = open_subject(str(model))
    probes.collect(opened, Traces.load(run), out=tmp_path / "s", recorders=[SegmentMeans(every=4)])
    steer("probe", "trajectory", model, "--from", run, "--out", tmp_path / "a.json", "--every", 4)
    common = (
        "probe",
        "trajectory",
        model,
        "--from",
        tmp_path / "s",
        "--sequential",
        "net",
        "--out",
        tmp_path / "b.json",
    )
    assert "cannot vote" in steer(*common, status=2)["message"], "a summary does not say what was answered"
    assert "--traces RUN" in steer(*common, "--suffix", "hence", status=2)["message"]
    answered = steer(*common, "--traces", run)
    first, second = (Trajectory.load(tmp_path / name) for name in ("a.json", "b.json"))
    np.testing.assert_array_equal(first.scores("net"), second.scores("net"))
    assert "vote" in {row["way"] for row in answered["ways"][0]["rows"]}


def test_officially_and_behind_a_suffix(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    common = ("probe", "trajectory", model, "--from", run, "--every", 4, "--out")
    ours, theirs, _ = (
        steer(*common, tmp_path / f"{name}.json", *more)
        for name, more in (("a", ()), ("b", ("--official",)), ("c", ("--suffix", "hence the answer is")))
    )
    assert (ours["compat"], theirs["compat"], theirs["scale"]) == (None, "official", None)
    found = [Trajectory.load(tmp_path / f"{name}.json") for name in "abc"]
    assert np.isfinite(found[2].scores("margin")).all(), "a suffix forces the answer after cut thoughts too"
    values = [one.rows[0].values["entropy"] for one in found]
    assert len({round(value, 6) for value in values}) == 3
    assert found[1].signs["entropy"] == 1


def test_people_get_tables_and_are_told_of_thoughts_that_are_too_short(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["probe", "trajectory", str(model), "--from", str(run), "--out", str(tmp_path / "t.json")]) == 0
    streams = capsys.readouterr()
    assert "36 of 36 thoughts have fewer than two segments of 500 tokens" in streams.err
    assert "--every" in streams.err
    arguments = ["probe", "trajectory", str(model), "--from", str(run), "--out", str(tmp_path / "u.json"), "--every", "4", "--sequential", "net"]  # fmt: skip
    assert app.run(arguments) == 0
    text = capsys.readouterr().out
    assert "adds to length" in text and "official majority (needs labels)" in text


def test_ungraded_traces_have_signals_and_no_areas(steer: Call, model: Path, tmp_path: Path) -> None:
    made.traces(6).save(tmp_path / "run")
    told = steer("probe", "trajectory", model, "--from", tmp_path / "run", "--out", tmp_path / "t.json", "--every", 4, "--plot", tmp_path / "t.svg")  # fmt: skip
    assert told["areas"] == [] and told["with_two_segments"] > 0
    assert (tmp_path / "t.svg").read_bytes().startswith(b"<?xml")


def test_bad_input_is_one_paragraph_with_status_2(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    common = ("probe", "trajectory", model, "--from", run, "--out")
    assert ".json" in steer(*common, tmp_path / "t.csv", status=2)["message"]
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    assert "exists already" in steer(*common, taken, status=2)["message"]
    out = tmp_path / "t.json"
    assert "no signal 'nett'" in steer(*common, out, "--every", 4, "--sequential", "nett", status=2)["message"]
    steer("collect", model, "--traces", run, "--out", tmp_path / "means")
    message = steer("probe", "trajectory", model, "--from", tmp_path / "means", "--out", out, status=2)["message"]
    assert "SegmentMeans" in message
    assert not out.exists() and taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("grade", "word"), [(False, "Every graded trace is wrong"), (True, "is right"), (None, "No trace is graded")]
)
def test_replies_of_one_kind_have_signals_and_no_areas(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], grade: bool | None, word: str
) -> None:
    traces = made.traces(4)
    Traces([replace(trace, correct=grade) for trace in traces], traces.meta).save(tmp_path / "one")
    words = ("probe", "trajectory", model, "--from", tmp_path / "one", "--every", 4, "--out", tmp_path / "t.json")
    assert app.run([str(each) for each in words]) == 0
    assert word in capsys.readouterr().err
    assert len(Trajectory.load(tmp_path / "t.json")) == len(traces)
