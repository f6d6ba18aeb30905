"""`make setup` trusts an environment only when it is ours, finished and whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(monkeypatch):
    spec = importlib.util.spec_from_file_location("environment", ROOT / "constraints" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path, environment):
    """A folder with a finished environment that holds one package."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "cpu.txt").write_text("# pins\nbox.of-things==1.0\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    (site / "box").mkdir(parents=True)
    (site / "box" / "__init__.py").write_text("x = 1\n")
    info = site / "box_of_things-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text('box/__init__.py,sha256=0,6\n"box/a,b.pyc",,\nbox_of_things-1.0.dist-info/RECORD,,\n')
    (tmp_path / ".venv" / "bin").mkdir()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("")
    python.chmod(0o755)
    (tmp_path / ".venv" / environment.STAMP).write_text(environment.stamp(tmp_path))
    return tmp_path


def test_a_finished_environment_is_trusted(environment, clone):
    assert environment.fault(clone) is None


def test_no_environment_is_told(environment, tmp_path):
    assert environment.fault(tmp_path) == "there is none yet"


def test_a_dangling_link_is_not_an_environment(environment, tmp_path):
    (tmp_path / ".venv").symlink_to(tmp_path / "gone")
    assert "not finished" in environment.fault(tmp_path)


def unfinished(clone: Path) -> None:
    (clone / ".venv" / ".steer-stamp").unlink()


def another_stamp(clone: Path) -> None:
    (clone / ".venv" / ".steer-stamp").write_text("somebody else's")


def changed_pins(clone: Path) -> None:
    (clone / "constraints" / "cpu.txt").write_text("box-of-things==1.0\nmore==2\n")


def changed_project(clone: Path) -> None:
    (clone / "pyproject.toml").write_text("[project]\nname = 'x'\n")


def no_interpreter(clone: Path) -> None:
    (clone / ".venv" / "bin" / "python").unlink()


def lost_interpreter(clone: Path) -> None:
    (clone / ".venv" / "bin" / "python").unlink()
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")


def lost_file(clone: Path) -> None:
    next(clone.glob(".venv/lib/*/site-packages/box/__init__.py")).unlink()


def cut_file(clone: Path) -> None:
    next(clone.glob(".venv/lib/*/site-packages/box/__init__.py")).write_text("x")


def lost_package(clone: Path) -> None:
    info = next(clone.glob(".venv/lib/*/site-packages/*.dist-info"))
    (info / "RECORD").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        unfinished,
        another_stamp,
        changed_pins,
        changed_project,
        no_interpreter,
        lost_interpreter,
        lost_file,
        cut_file,
        lost_package,
    ],
)
def test_a_damaged_or_foreign_environment_is_not_trusted(environment, clone, damage):
    damage(clone)
    assert environment.fault(clone)


def test_an_environment_that_moved_is_not_trusted(environment, clone, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "clone"
    clone.rename(elsewhere)
    assert "another place" in environment.fault(elsewhere)


def test_a_failed_step_leaves_no_stamp_and_says_so(environment, clone, monkeypatch, capfd):
    (clone / "constraints" / "cpu.txt").write_text("torch==0.0.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(
        environment, "run", lambda command, root, what: (_ for _ in ()).throw(SystemExit(f"{what} failed"))
    )
    with pytest.raises(SystemExit, match="failed"):
        environment.make(clone)
    assert environment.fault(clone) == "there is none yet"


def test_pins_are_exact_public_and_name_no_place():
    lines = [line for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    assert "torch==2.13.0" in lines
    names = [line.split("==")[0].lower() for line in lines]
    assert names == sorted(set(names))


def test_pins_lie_inside_the_ranges_of_the_metadata():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["lens"], *extras["gguf"]]:
        needed = Requirement(text)
        assert needed.specifier.contains(pins[needed.name.lower().replace("_", "-")]), text


def test_this_very_environment_is_the_pinned_one():
    from importlib.metadata import version

    for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, pinned = line.split("==")
            assert version(name).split("+")[0] == pinned, name


def test_ci_runs_the_command_of_the_readme():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert commands == ['cd "$(dirname "$0")/.." && exec make test']
    assert "make test" in (ROOT / "README.md").read_text()


def test_make_knows_its_targets_without_running_them():
    shown = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    order = [shown.index(word) for word in ("environment.py", "ruff", "mypy", "lint-imports", "pytest")]
    assert order == sorted(order)
    assert sys.version_info >= (3, 11)
