"""The example on docs/hooks.md runs, and docs/anatomy.md knows every family, key and identity."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from steer.anatomy.record import Record, families
from steer.sites import SITES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_runs_as_it_stands():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "hooks.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(block, "docs/hooks.md", "exec"), names)
    assert names["report"].touched == {(2, "resid_post"): {"generated": 3}, (3, "resid_post"): {"generated": 3}}


def test_the_page_on_anatomy_is_complete():
    text = (DOCS / "anatomy.md").read_text(encoding="utf-8")
    assert [name for name in families() if f"`{name}`" not in text] == []
    assert [name for name in Record.model_fields if f"`{name}`" not in text] == []


def test_the_table_of_sites_is_complete():
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    assert [name for name in SITES if f"`{name}`" not in text] == []
