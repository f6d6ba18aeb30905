"""Another folder called `probes`, `edits` or `experiments` must be noticed and named, not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from steer.cli.origin import OURS, check_origin


def run(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "steer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


def test_ours_are_ours():
    check_origin()


@pytest.mark.parametrize("name", OURS)
def test_a_package_that_shadows_ours_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported the wrong one')\n")
    shadowed = run(tmp_path, "doctor", "--json")
    assert shadowed.returncode == 2
    error = json.loads(shadowed.stdout)["error"]
    assert str(tmp_path / name) in error["found"] and name in error["expected"]


def test_a_module_that_shadows_ours_is_named(tmp_path):
    (tmp_path / "edits.py").write_text("")
    shadowed = run(tmp_path, "doctor")
    assert shadowed.returncode == 2 and str(tmp_path / "edits.py") in shadowed.stderr


def test_a_folder_without_init_does_not_shadow(tmp_path):
    (tmp_path / "experiments").mkdir()
    assert run(tmp_path, "doctor", "--nonsense").stderr.startswith("steer: No such option")


def test_help_works_even_when_shadowed(tmp_path):
    (tmp_path / "probes.py").write_text("")
    assert run(tmp_path, "--help").returncode == 0
