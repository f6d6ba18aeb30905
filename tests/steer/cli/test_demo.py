"""`steer demo`: where it writes and what it refuses; what it finds is tested in tests/experiments/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiments.demo
from experiments.bench import MARK
from steer.cli import app


class BegunError(Exception):
    """Raised where the work would begin."""


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Run in an empty folder; the demo itself is a note of where it would write."""
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[Path, int]] = []

    def noted(out, seed=0, *, tell=None):
        asked.append((Path(out), seed))
        raise BegunError

    monkeypatch.setattr(experiments.demo, "demo", noted)
    return asked


def test_without_a_folder_an_earlier_demo_is_replaced(folders):
    with pytest.raises(BegunError):
        app.run(["demo", "--seed", "3"])
    assert folders == [(Path("demo"), 3)]
    Path("demo").mkdir()
    (Path("demo") / MARK).write_text("made_by: steer demo\nmodel: organism:chain\n")
    (Path("demo") / "report.html").write_text("old")
    with pytest.raises(BegunError):
        app.run(["demo"])
    assert not Path("demo").exists(), "the old one is gone before the new one is made"


def test_something_else_called_demo_is_kept(folders, capsys):
    Path("demo").mkdir()
    (Path("demo") / "mine.txt").write_text("x")
    assert app.run(["demo"]) == 2
    assert "not made by the demo" in capsys.readouterr().err
    assert (Path("demo") / "mine.txt").read_text() == "x" and folders == []


def test_a_folder_that_was_named_is_never_replaced(monkeypatch, tmp_path, capsys):
    (tmp_path / MARK).write_text("made_by: steer demo\n")
    assert app.run(["demo", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / MARK).exists()


def test_the_mixture_is_refused_and_the_old_demo_kept(folders, capsys):
    Path("demo").mkdir()
    (Path("demo") / MARK).write_text("made_by: steer demo\n")
    assert app.run(["demo", "--moe", "--json"]) == 2
    assert "not bundled" in json.loads(capsys.readouterr().out)["error"]["found"]
    assert Path("demo").exists()
