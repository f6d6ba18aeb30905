"""The notebook runs from top to bottom, shows what it says, and is committed without outputs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[3]
FILE = ROOT / "experiments" / "notebooks" / "edit_a_checkpoint.ipynb"


def cells(notebook, start):
    """The code cell that begins with a text."""
    (found,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return found


def shown(cell, kind="text/plain"):
    """What a cell returned, as text."""
    return "".join(output.get("data", {}).get(kind, "") for output in cell["outputs"])


def test_it_is_committed_without_outputs_and_names_no_machine():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", FILE.read_text("utf-8")) and FILE.stat().st_size < 20_000


@pytest.mark.effects
def test_it_runs_and_shows_the_edit_and_the_vector(tmp_path):
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert "proved" in shown(cells(notebook, "edited = plan"), "text/html")
    assert shown(cells(notebook, "original =")) == "True"
    before, after = ast.literal_eval(shown(cells(notebook, "before =")))
    assert after > before
    curve = ast.literal_eval(shown(cells(notebook, "sibling =")))
    assert curve["vector", -1.0] + 0.15 < curve["vector", 0.0] < curve["vector", 1.0] - 0.05
    assert abs(curve["random", 1.0] - curve["random", 0.0]) < 0.1
    assert shown(cells(notebook, "added = vector")) == "0"
    assert "image/png" in cells(notebook, "vector = ")["outputs"][0]["data"]
