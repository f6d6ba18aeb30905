"""Lazy exports of a package (PEP 562), also where a function has the name of its module.

`import steer` must not import torch, and `probes.collect(...)` is a function although `probes/collect/` is a folder.
A package says in its `__init__` which module defines each exported name; the module is imported at first use. When
Python binds a freshly imported submodule in its package, the function of the same name is bound in its place, so
`probes.collect` means one thing whatever was imported first. (`import probes.collect as x` therefore gives the
function; `from probes.collect import name` gives what the module defines.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType


def export(package: str, names: Mapping[str, str]) -> None:
    """Make `package` import the module of each exported name when the name is first used.

    Args:
        package: the package's `__name__`.
        names: exported name -> module that defines it.
    """

    class Package(ModuleType):
        """The package's module, which looks up its exports."""

        def __getattr__(self, name: str) -> object:
            if name not in names:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(names[name]), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: object) -> None:
            if isinstance(value, ModuleType) and name in names:
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *names})

    module = sys.modules[package]
    module.__class__ = Package
    module.__dict__["__all__"] = sorted(names)
