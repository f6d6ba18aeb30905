"""The notebook runs from top to bottom, shows what it says, and is committed without outputs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[3]
FILE = ROOT / "experiments" / "notebooks" / "find_cognitive_experts.ipynb"


def shown(notebook, start, kind="text/plain"):
    """What the code cell that begins with a text returned."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return "".join(output.get("data", {}).get(kind, "") for output in cell["outputs"])


def value(notebook, start):
    """The same, as the plain value that it is."""
    return ast.literal_eval(shown(notebook, start))


def test_it_is_committed_without_outputs_and_names_no_machine():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", FILE.read_text("utf-8")) and FILE.stat().st_size < 20_000


@pytest.mark.effects
def test_it_runs_and_shows_experts_hook_checkpoint_and_twin(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    planted, best, ties = value(notebook, 'm.card["planted"]')
    assert sorted(map(tuple, planted)) == sorted(best) and ties == ()
    assert all("image/png" in _data(notebook, start) for start in ("best =", "scores.volcano"))
    assert "router" in shown(notebook, "louder =", "text/html")
    plain, right = value(notebook, "pairs =")
    assert right["found", 0] < plain - 0.05 and right["found", 16] > plain + 0.05
    assert abs(right["matched", 4] - plain) < 0.08
    factor, returned = value(notebook, "layer, expert =")
    assert factor == pytest.approx(16) and returned is True
    assert "agree" in shown(notebook, "edited =", "text/html")
    counts = value(notebook, "without =")
    assert [row[0] for row in counts] == [0, 0] and sum(map(sum, counts)) > 1000
    gain = value(notebook, "gain =")
    assert gain[4] - gain[1] < 0.08


def _data(notebook, start):
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}
