"""The page about patches says what the code does."""

from __future__ import annotations

import doctest
from pathlib import Path

from tests.edits.material import contents

PAGE = Path(__file__).parents[2] / "docs" / "patches.md"
BASE = Path(__file__).parents[2] / "steer" / "builtin" / "chain"


def test_every_example_runs_as_shown(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("```\n", "\n")
    parsed = doctest.DocTestParser().get_doctest(text, {"work": tmp_path}, PAGE.name, str(PAGE), 0)
    assert len(parsed.examples) >= 10
    shown: list[str] = []
    found = doctest.DocTestRunner(verbose=False).run(parsed, out=shown.append)
    assert found.failed == 0, "".join(shown)
    assert contents(tmp_path / "edited-reverted") == contents(BASE)
