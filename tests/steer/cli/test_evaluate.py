"""`steer evaluate`: folders, JSON, resuming, and what it refuses."""

from __future__ import annotations

import json

import pytest

from experiments.run import Run
from steer.cli import app

QUICK = ("--task", "chain", "--limit", "4", "--max-new-tokens", "30")


def run(*words: str) -> int:
    return app.run(["evaluate", *words])


def test_a_run_folder_and_its_figures(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert run("organism:chain", *QUICK, "--samples", "2", "--seed", "5", "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = Run.load(out)
    assert printed == {"out": out, "subject": "organism:chain", "task": "chain", **found.summary}
    assert found.traces.meta["seed"] == 5 and found.traces.meta["sampling"]["max_new_tokens"] == 30
    assert found.traces.meta["sampling"]["temperature"] == 0.8, "the card's, where nothing was told"
    assert printed["questions"] == 4 and printed["samples"] == 2


def test_people_get_words(tmp_path, capsys):
    assert run("organism:chain", "--task", "chain", "--limit", "4", "--out", str(tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and "thinking tokens, mean" in said and "closed thoughts" in said


def test_resume_takes_the_same_options_only(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert run("organism:chain", *QUICK, "--out", out) == 0
    before = (tmp_path / "run" / "traces.jsonl").read_bytes()
    assert run("organism:chain", *QUICK, "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("organism:chain", *QUICK, "--out", out, "--resume") == 0
    assert run("organism:chain", *QUICK, "--out", out, "--resume", "--seed", "1") == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert (tmp_path / "run" / "traces.jsonl").read_bytes() == before


def test_a_policy_and_no_thinking(tmp_path):
    assert run("organism:chain", *QUICK, "--policy", "budget:10", "--out", str(tmp_path / "budget")) == 0
    found = Run.load(tmp_path / "budget")
    assert max(trace.thinking_tokens for trace in found.traces) <= 12
    assert run("organism:chain", *QUICK, "--no-thinking", "--out", str(tmp_path / "none")) == 0
    found = Run.load(tmp_path / "none")
    assert found.traces.meta["thinking"] is False
    assert [len(trace.completion_token_ids) for trace in found.traces] == [4] * 4, "only the answer"
    assert all(trace.answer is not None for trace in found.traces)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "gsm9k"), "no task"),
        (("--task", "jsonl:none.jsonl"), "none.jsonl"),
        (("--task", "chain", "--instruction", "Think"), "instruction"),
        (("--task", "chain", "--policy", "hurry"), "hurry"),
        (("--task", "chain", "--temperature", "-1"), "--temperature"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, capsys, words, message):
    out = tmp_path / "run"
    assert run("organism:chain", "--limit", "2", *words, "--out", str(out)) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_errors_are_one_object_with_json(tmp_path, capsys):
    assert run("organism:chain", "--task", "gsm8k", "--out", str(tmp_path / "run"), "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["status"] == 2 and "gsm8k:FILE" in error["expected"]
