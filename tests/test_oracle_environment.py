"""`make oracle` makes an environment that can import mergekit, or says why not, and never fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "constraints" / "oracle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "oracle.txt").write_text("nothing-of-this-name==0.0.1\n")
    (tmp_path / "constraints" / "cpu.txt").write_text("torch==0\n")
    return tmp_path


def test_a_package_that_cannot_be_had_is_said_and_does_not_fail(
    oracle: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(oracle, "ROOT", clone)
    oracle.main()
    assert "pip install of constraints/oracle.txt failed" in capfd.readouterr().err
    assert oracle.fault(clone) == "there is none that was finished"


def test_a_finished_environment_is_trusted_until_something_changes(oracle: ModuleType, clone: Path) -> None:
    venv = clone / oracle.VENV
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / oracle.STAMP).write_text(oracle.stamp(clone))
    assert oracle.fault(clone) is None
    (clone / "constraints" / "oracle.txt").write_text("mergekit==0.1.4\n")
    assert "another place" in str(oracle.fault(clone))
    (venv / oracle.STAMP).write_text(oracle.stamp(clone))
    (venv / "bin" / "python").unlink()
    assert "interpreter is gone" in str(oracle.fault(clone))


def test_nothing_of_ours_can_import_mergekit() -> None:
    done = subprocess.run([sys.executable, "-c", "import mergekit"], capture_output=True, check=False, cwd="/")
    assert done.returncode != 0
