"""What the README and the pages say: the Python runs as it stands, so do the commands, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in fenced if name == language]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_python_runs_as_it_stands_and_does_what_its_comments_say(tmp_path):
    (code,) = blocks("python")
    (tmp_path / "readme.py").write_text(code)
    done = run([sys.executable, "readme.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    plain, steered = (
        float(re.search(rf"^{name} ([\d.]+)", done.stdout, re.MULTILINE)[1]) for name in ("plain", "steered")
    )
    assert steered > plain + 3
    assert re.search(r"bytes +equal", done.stdout)
    assert (tmp_path / "edited" / "model.safetensors").is_file()


def test_the_python_is_about_twenty_lines():
    (code,) = blocks("python")
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "#"))]
    assert 15 <= len(statements) <= 22


@pytest.mark.effects
def test_the_commands_run_in_their_order_and_the_edit_helps(tmp_path):
    (commands,) = [block for block in blocks("") if block.startswith("steer ")]
    for line in commands.splitlines():
        done = run([*shlex.split(line), "--quiet"], tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("fit", "after"))
    assert after["accuracy"]["value"] > before["accuracy"]["value"]


def test_the_first_screen_says_what_this_is_and_how_to_begin():
    screen = "\n".join(README.splitlines()[:30])
    for needed in ("make demo", "make test", "docs/images/demo.png", "reasoning model"):
        assert needed in screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_list_of_pages_is_complete():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_place_of_one_machine(page):
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", page.read_text(encoding="utf-8"))
