"""The page about editing weights says what the code does."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import yaml

from edits.merge.plan import plan
from edits.merge.recipe import METHODS
from steer.anatomy.slots import WORDS
from steer.cli import app
from tests.edits.material import contents

PAGE = Path(__file__).parents[2] / "docs" / "editing_weights.md"
TEXT = PAGE.read_text(encoding="utf-8")
BASE = Path(__file__).parents[2] / "steer" / "builtin" / "chain"


def test_every_example_runs_as_shown(tmp_path: Path) -> None:
    text = TEXT.replace("```\n", "\n")
    parsed = doctest.DocTestParser().get_doctest(text, {"work": tmp_path}, PAGE.name, str(PAGE), 0)
    assert len(parsed.examples) >= 35
    shown: list[str] = []
    found = doctest.DocTestRunner(verbose=False).run(parsed, out=shown.append)
    assert found.failed == 0, "".join(shown)
    assert contents(tmp_path / "edited-reverted") == contents(BASE)


def test_every_command_is_a_verb_with_options_that_it_has(capsys) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    commands = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith(("steer ", "$ steer "))]
    assert len(commands) >= 10
    for words in commands:
        verb = app.find(words[1:])
        assert app.run([*verb.name.split(), "--help"]) == 0
        offered = capsys.readouterr().out
        assert all(word in offered for word in words if word.startswith("--")), words


def test_the_recipe_is_one() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert plan(yaml.safe_load(text)).recipe.merge_method == "task_arithmetic"


def test_methods_and_words_are_all_told() -> None:
    assert all(f"`{name}`" in TEXT for name in (*METHODS, *WORDS))
