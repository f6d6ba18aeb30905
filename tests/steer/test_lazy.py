"""Exports: every name is there, means the function even where a module has its name, and costs nothing before use."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ("steer", "probes", "edits", "experiments")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_resolves_to_what_its_module_defines(package):
    module = import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        assert not isinstance(value, type(sys)), f"{package}.{name} is a module"
        assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_type_checker_sees_the_same_names(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    call = next(node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    assert seen == ast.literal_eval(call.args[1])


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_heavy(package):
    code = f"import sys, {package}; print(*(m for m in ('torch', 'transformers', 'numpy', 'typer', 'rich') if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_function_wins_over_its_module_whatever_is_imported_first(tmp_path, monkeypatch):
    folder = tmp_path / "lazybox"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from steer.lazy import export\nexport(__name__, {'work': 'lazybox.work', 'other': 'lazybox.deep'})\n"
    )
    (folder / "work.py").write_text("def work(): return 'worked'\nnumber = 3\n")
    (folder / "deep.py").write_text("import lazybox.work\nfrom lazybox.work import number\nother = number\n")
    monkeypatch.syspath_prepend(tmp_path)
    box = import_module("lazybox")
    assert box.other == 3
    assert box.work() == "worked"
    assert import_module("lazybox.work").number == 3
    assert box.deep.number == 3
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = box.absent
