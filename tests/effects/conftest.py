"""One laboratory for the whole lane, so that every run is made once, whichever worker asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.effects.lab import Lab


@pytest.fixture(scope="session")
def lab(shared_folder: Callable[[str], Path]) -> Lab:
    """The organism with its runs."""
    return Lab(shared_folder("effects"))
