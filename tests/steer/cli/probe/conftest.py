"""What every test of a probe verb types, and the model that most of them read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from steer.cli import app

Call = Callable[..., dict[str, Any]]


@pytest.fixture
def steer(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a verb with --json, check its status, and return its object, or the error in it."""

    def call(*arguments: object, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert app.run([*map(str, arguments), "--json"]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found["error"] if status else found

    return call
