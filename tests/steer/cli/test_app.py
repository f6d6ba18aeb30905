"""The program's contract: statuses, one paragraph or one JSON object per error, every verb there, quick to start."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from steer.cli import app
from steer.cli.verbs import GROUPS, VERBS, Verb
from steer.errors import SteerError

ROOT = Path(__file__).parents[3]
ISSUE = [
    "demo",
    "doctor",
    "inspect",
    "generate",
    "evaluate",
    "collect",
    "probe-length",
    "probe-heads",
    "patch-thinkedit",
    "apply",
    "revert",
    "verify",
]


def steer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.fixture
def verb(monkeypatch):
    """Register a verb `try` whose command is given, as if from a module of its own."""

    def register(command):
        import types

        module = types.ModuleType("steer.cli.trial")
        module.command = command
        monkeypatch.setitem(sys.modules, "steer.cli.trial", module)
        monkeypatch.setitem(VERBS, "try", Verb("try", "steer.cli.trial", "a trial"))

    return register


def raising(error: Exception):
    def command(json: bool = False) -> None:
        """Fail."""
        raise error

    return command


def test_the_listed_verbs_are_those_promised():
    assert {name.replace(" ", "-") for name in VERBS} >= set(ISSUE)
    assert {name.split()[0] for name in VERBS if " " in name} == set(GROUPS)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_resolves_explains_itself_and_has_the_common_options(name, capsys):
    assert callable(import_module(VERBS[name].module).command)
    assert app.run([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--json", "--quiet", "--seed"):
        assert option in shown, f"steer {name} lacks {option}"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(words, capsys):
    assert app.run(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and verb.help in shown for name, verb in VERBS.items())


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_lists_its_verbs_only(group, capsys):
    assert app.run([group]) == 0
    shown = capsys.readouterr().out
    assert f"{group} " in shown and "doctor" not in shown


@pytest.mark.parametrize(
    ("words", "remedy"),
    [(["inspct"], "inspect"), (["probe", "lenght"], "probe length"), (["zzz"], "--help"), (["--frobnicate"], "--help")],
)
def test_a_wrong_verb_exits_2_and_names_the_remedy(words, remedy, capsys):
    assert app.run(words) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and remedy in streams.err and streams.err.count("\n") == 1


def test_a_wrong_option_exits_2(verb, capsys):
    verb(raising(ValueError("not reached")))
    assert app.run(["try", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err


def test_a_wrong_value_exits_2_as_json(verb, capsys):
    def command(number: int, json: bool = False) -> None:
        """Count."""

    verb(command)
    assert app.run(["try", "three", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "number" in error["message"] and error["status"] == 2


def test_the_callers_error_is_one_paragraph_and_status_2(verb, capsys):
    verb(raising(SteerError("the folder x is empty", "a checkpoint", "Download it")))
    assert app.run(["try"]) == 2
    assert capsys.readouterr().err == "steer: The folder x is empty; expected a checkpoint. Download it.\n"


def test_the_callers_error_is_one_object_under_json(verb, capsys):
    verb(raising(SteerError("the folder x is empty", "a checkpoint", "Download it")))
    assert app.run(["try", "--json"]) == 2
    streams = capsys.readouterr()
    assert streams.err == ""
    error = json.loads(streams.out)["error"]
    assert (error["found"], error["expected"], error["remedy"]) == (
        "the folder x is empty",
        "a checkpoint",
        "Download it",
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EEXIST])
def test_trouble_with_the_disk_is_status_2_and_names_the_path(verb, capsys, number):
    verb(raising(OSError(number, os.strerror(number), "some/file")))
    assert app.run(["try"]) == 2
    assert "some/file" in capsys.readouterr().err


def test_other_trouble_of_the_system_is_not_hidden(verb):
    verb(raising(OSError(errno.ECHILD, "no child")))
    with pytest.raises(OSError, match="no child"):
        app.run(["try"])


def test_status_of_a_command_that_returns_nothing_exits_or_is_interrupted(verb):
    import typer

    verb(lambda: None)
    assert app.run(["try"]) == 0
    verb(raising(typer.Exit(3)))
    assert app.run(["try"]) == 3
    verb(raising(KeyboardInterrupt()))
    assert app.run(["try"]) == 130


def test_global_options_may_stand_before_the_verb(verb):
    seen = []

    def command(json: bool = False, quiet: bool = False, seed: int = 0) -> None:
        """Tell."""
        seen.append((json, quiet, seed))

    verb(command)
    assert app.run(["--json", "--seed", "7", "try"]) == 0
    assert app.run(["--seed=8", "--quiet", "try"]) == 0
    assert seen == [(True, False, 7), (False, True, 8)]


FAULT = """
import sys, types
from steer.cli import app
from steer.cli.verbs import VERBS, Verb
module = types.ModuleType("steer.cli.trial")
def command(json: bool = False) -> None:
    raise ZeroDivisionError("nobody expected this")
module.command = command
sys.modules["steer.cli.trial"] = module
VERBS["try"] = Verb("try", "steer.cli.trial", "a trial")
app.main(["try", *sys.argv[1:]])
"""


def fault(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FAULT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_an_unexpected_exception_is_our_fault_in_one_line_with_status_1():
    run = fault()
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "our fault" in run.stderr and "nobody expected this" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_unexpected_exception_shows_its_traceback_on_request():
    assert "Traceback" in fault(STEER_DEBUG="1").stderr


def test_an_unexpected_exception_is_one_object_under_json():
    run = fault("--json")
    assert run.returncode == 1 and json.loads(run.stdout)["error"]["status"] == 1


def test_a_reader_that_stops_reading_is_no_error():
    line = f"{sys.executable} -m steer.cli --help | head -c 1"
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stderr == ""


def test_the_version_is_the_packages():
    import steer as package

    assert steer("--version").stdout.split() == ["reasoning-steer", package.__version__]


def test_help_and_a_wrong_verb_import_nothing_heavy():
    code = (
        "import sys\nfrom steer.cli import app\napp.run(['--help'])\napp.run(['nonsense'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'typer', 'rich', 'pydantic') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ("/runs/out.4711.partial", "/runs/out"),
        ("/runs/.scores.safetensors.4711.partial", "/runs/scores.safetensors"),
        ("/runs/out.partial", "/runs/out"),
        ("plain.yaml", "plain.yaml"),
        ("/runs/.hidden", "/runs/.hidden"),
    ],
)
def test_a_disk_error_names_the_path_that_the_caller_gave(written, given):
    assert app._as_given(written) == given
