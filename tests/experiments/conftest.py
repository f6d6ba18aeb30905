from dataclasses import replace

import pytest

import steer
from experiments.demo import Plan, demo
from experiments.demo_result import DemoResult
from steer.model import SteerableModel


@pytest.fixture(scope="session")
def organism() -> SteerableModel:
    """The bundled organism; nobody may change it."""
    return steer.load("organism:chain", self_check=False)


@pytest.fixture(scope="session")
def small_demo(organism: SteerableModel, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """The whole loop in small: twelve questions a point, one control."""
    plan = replace(Plan.of(organism.card or {}), questions=12, fit_questions=60, controls=1)
    return demo(tmp_path_factory.mktemp("demo") / "demo", 1, plan=plan)
