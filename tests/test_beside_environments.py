"""`make oracle` and `make vllm` make environments beside `.venv`, or say why not, and never fail."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("beside", ROOT / "constraints" / "beside.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "beside", module)  # A dataclass looks its module up.
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "oracle.txt").write_text("nothing-of-this-name==0.0.1\n")
    (tmp_path / "constraints" / "cpu.txt").write_text("torch==0\n")
    return tmp_path


def test_a_package_that_cannot_be_had_is_said_and_does_not_fail(
    beside: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    oracle = beside.Beside("oracle", "mergekit", clone)
    oracle.main()
    said = capfd.readouterr().err
    assert "oracle: no mergekit to compare with (pip install of constraints/oracle.txt failed" in said
    assert oracle.fault() == "there is none that was finished"


def test_a_finished_environment_is_trusted_until_something_changes(beside: ModuleType, clone: Path) -> None:
    oracle = beside.Beside("oracle", "mergekit", clone)
    (oracle.venv / "bin").mkdir(parents=True)
    (oracle.venv / "bin" / "python").symlink_to(sys.executable)
    (oracle.venv / beside.STAMP).write_text(oracle.stamp())
    assert oracle.fault() is None
    (clone / "constraints" / "oracle.txt").write_text("mergekit==0.1.4\n")
    assert "another place" in str(oracle.fault())
    (oracle.venv / beside.STAMP).write_text(oracle.stamp())
    (oracle.venv / "bin" / "python").unlink()
    assert "interpreter is gone" in str(oracle.fault())


def test_an_environment_reads_its_neighbour_behind_its_own_packages(beside: ModuleType, clone: Path) -> None:
    (clone / "constraints" / "empty.txt").write_text("# Nothing.\n")
    empty = beside.Beside("empty", "nothing", clone)
    assert empty.make() is None  # Before there is a `.venv`: the two are made at the same time.
    assert empty.fault() is None
    (own,) = empty.venv.glob("lib/*/site-packages")
    shared = clone / ".venv" / own.relative_to(empty.venv)
    shared.mkdir(parents=True)
    asked = [empty.venv / "bin" / "python", "-c", "import sys; print(*sys.path, sep='\\n')"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True, cwd="/").stdout.splitlines()
    assert [place for place in path if place.startswith(str(clone))] == [str(own), str(shared), str(clone)]


@pytest.mark.parametrize("program", ["mergekit", "vllm"])
def test_nothing_of_ours_can_import_them(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {program}"], capture_output=True, check=False, cwd="/")
    assert done.returncode != 0


def test_no_package_is_pinned_beside_that_the_neighbour_holds() -> None:
    def names(file: str) -> set[str]:
        lines = (ROOT / "constraints" / file).read_text().splitlines()
        return {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}

    assert not names("vllm.txt") & names("cpu.txt")
    assert not names("oracle.txt") & names("cpu.txt")
