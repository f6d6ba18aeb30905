import pytest

import steer
from steer.model import SteerableModel


@pytest.fixture(scope="session")
def organism() -> SteerableModel:
    """The bundled organism; nobody may change it."""
    return steer.load("organism:chain", self_check=False)
