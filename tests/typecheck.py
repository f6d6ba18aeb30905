"""What checks annotations while tests run: beartype, told two things that Python's type system leaves to mypy.

Names imported under `if TYPE_CHECKING` do not exist at run time, so annotations that use them are not checked here;
an int is accepted where a float is declared (PEP 484); a Protocol is checked by the names of its members.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, runtime_checkable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: FunctionType) -> Callable[..., Any]:
    """Return `function` with its annotations checked at each call; jaxtyping's import hook calls this."""
    _let_protocols_be_checked(function.__module__)
    guarded = _guarded(function.__module__)
    for name, hint in list(function.__annotations__.items()):
        text = hint if isinstance(hint, str) else _text(hint)
        if guarded & set(re.findall(r"\w+", text)):
            function.__annotations__[name] = Any
    return _check(function)


def _let_protocols_be_checked(module: str) -> None:
    for value in list(vars(sys.modules[module]).values()) if module in sys.modules else ():
        if (
            isinstance(value, type)
            and vars(value).get("_is_protocol")
            and not getattr(value, "_is_runtime_protocol", False)
        ):
            runtime_checkable(value)


def _text(hint: object) -> str:
    return str(hint) if "ForwardRef" in str(hint) or "'" in str(hint) else ""


@cache
def _guarded(module: str) -> frozenset[str]:
    """Names that `module` imports under `if TYPE_CHECKING`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return frozenset()
    blocks = [
        node
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    imports = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.Import | ast.ImportFrom)]
    return frozenset((alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names)
