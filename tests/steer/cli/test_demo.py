"""`steer demo`: where it writes and what it refuses; what it finds is tested in tests/experiments/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiments.demo
import experiments.demo_experts
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
    monkeypatch.setattr(experiments.demo_experts, "demo_experts", noted)
    return asked


@pytest.mark.parametrize(("flags", "name"), [((), "demo"), (("--moe",), "demo-moe")])
def test_without_a_folder_an_earlier_demo_is_replaced(folders, flags, name):
    with pytest.raises(BegunError):
        app.run(["demo", *flags, "--seed", "3"])
    assert folders == [(Path(name), 3)]
    Path(name).mkdir()
    (Path(name) / MARK).write_text("made_by: steer demo\nmodel: organism:chain\n")
    (Path(name) / "report.html").write_text("old")
    with pytest.raises(BegunError):
        app.run(["demo", *flags])
    assert not Path(name).exists(), "the old one is gone before the new one is made"


@pytest.mark.parametrize(("flags", "name"), [((), "demo"), (("--moe", "--json"), "demo-moe")])
def test_something_else_called_demo_is_kept(folders, capsys, flags, name):
    Path(name).mkdir()
    (Path(name) / "mine.txt").write_text("x")
    assert app.run(["demo", *flags]) == 2
    said = capsys.readouterr()
    assert "not made by the demo" in (json.loads(said.out)["error"]["found"] if flags else said.err)
    assert (Path(name) / "mine.txt").read_text() == "x" and folders == []


@pytest.mark.parametrize("flags", [(), ("--moe",)])
def test_a_folder_that_was_named_is_never_replaced(tmp_path, capsys, flags):
    (tmp_path / MARK).write_text("made_by: steer demo\n")
    assert app.run(["demo", *flags, "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / MARK).exists()


def test_each_demo_leaves_that_of_the_other_alone(folders):
    for name in ("demo", "demo-moe"):
        Path(name).mkdir()
        (Path(name) / MARK).write_text("made_by: steer demo\n")
    with pytest.raises(BegunError):
        app.run(["demo", "--moe"])
    assert Path("demo").exists() and not Path("demo-moe").exists()
