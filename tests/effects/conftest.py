"""One laboratory for the whole lane, so that every run is made once."""

from __future__ import annotations

import pytest

from tests.effects.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The organism with its runs."""
    return Lab(tmp_path_factory.mktemp("effects"))
