"""docs/cli.md has every verb with exactly the options that it takes, and examples that parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steer.cli import app
from steer.cli.verbs import VERBS

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMON = {"--json", "--quiet", "--seed", "--help"}


def section(verb: str) -> str:
    return re.search(rf"^## {verb}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


def test_the_page_has_the_verbs_in_their_order():
    assert [line for line in re.findall(r"^## (.*)$", PAGE, re.MULTILINE) if line != "Everywhere"] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_table_is_its_options(verb, capsys):
    assert app.run([*verb.split(), "--help"]) == 0
    offered = {
        name for line in capsys.readouterr().out.splitlines() for name in options(re.split(r"\s{2,}", line.strip())[0])
    }
    told = options("\n".join(line.split("|")[1] for line in section(verb).splitlines() if line.startswith("|")))
    assert told == offered - COMMON


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_examples_use_its_options_only(verb):
    examples = re.search(r"```\n(.*?)```", section(verb), re.DOTALL)[1].splitlines()
    table = options("\n".join(line for line in section(verb).splitlines() if line.startswith("|")))
    for example in examples:
        words = shlex.split(example)
        assert words[0] == "steer" and app.find(words[1:]).name == verb
        own = words[: words.index("--")] if "--" in words else words  # What stands behind is another program's.
        assert {word for word in own if word.startswith("--")} <= table | COMMON


def test_statuses_are_those_of_the_program():
    assert {"| 0 |", "| 1 |", "| 2 |", "| 130 |"} <= set(re.findall(r"\| \d+ \|", PAGE))
