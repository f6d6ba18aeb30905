"""Streams of a verb: results on stdout, everything else on stderr, JSON that any reader takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from steer.cli.output import Output, dumps


@dataclass(frozen=True)
class Value:
    path: Path
    numbers: tuple[float, ...]


def test_json_is_one_object_and_nothing_else(capsys):
    out = Output(json=True)
    out.text("for people")
    out.table("t", ["a"], [[1]])
    out.result({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_people_get_text_and_tables_and_no_json(capsys):
    out = Output()
    out.table("Layers", ["layer", "site"], [[1, "z"], [10, "resid_post"]])
    out.result({"a": 1})
    assert capsys.readouterr().out == "Layers\n  layer  site\n      1  z\n     10  resid_post\n"


def test_a_table_writes_numbers_shortly_and_none_as_a_dash(capsys):
    Output().table("", ["x", "y"], [[1 / 3, None], [2e-9, "b"]])
    assert capsys.readouterr().out.splitlines()[1:] == ["  0.3333  –", "   2e-09  b"]


def test_remarks_go_to_stderr_unless_quiet(capsys):
    Output().remark("loading")
    Output(quiet=True).remark("hidden")
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err == "loading\n"


def test_values_become_plain_json():
    value = {
        "value": Value(Path("a/b"), (1.0, float("nan"), float("inf"))),
        "tensor": torch.tensor([[1.0, 2.0]]),
        "array": np.float32(0.5),
        "set": {3},
        4: None,
    }
    assert json.loads(dumps(value)) == {
        "value": {"path": "a/b", "numbers": [1.0, None, None]},
        "tensor": [[1.0, 2.0]],
        "array": 0.5,
        "set": [3],
        "4": None,
    }


def test_progress_is_silent_where_nobody_looks(capsys):
    with Output().progress("collecting", total=10) as bar:
        bar.to(3, 10, "fast")
        bar.add(1)
    streams = capsys.readouterr()
    assert streams.out == streams.err == ""


def test_progress_goes_to_a_terminal_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Output(json=True).progress("collecting", total=4) as bar:
        bar.to(2, 4, "7 tokens/s")
        bar.add(2)
    streams = capsys.readouterr()
    assert streams.out == "" and "collecting" in streams.err and "4/4" in streams.err


def test_progress_is_quiet_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Output(quiet=True).progress("collecting") as bar:
        bar.add(1)
    assert capsys.readouterr().err == ""
