from dataclasses import replace

import pytest

import steer
from experiments.demo import Plan, demo
from experiments.demo_experts import ExpertPlan, demo_experts
from experiments.demo_experts_result import ExpertDemoResult
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


@pytest.fixture(scope="session")
def small_experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertDemoResult:
    """The whole loop on the mixture in small: twelve questions a point, one random pair."""
    plan = ExpertPlan(
        betas=(0.0, 1.0, 4.0, 64.0),
        control_betas=(1.0, 4.0, 64.0),
        twin_betas=(1.0, 4.0),
        questions=12,
        fit_questions=24,
        controls=1,
        resamples=100,
    )
    return demo_experts(tmp_path_factory.mktemp("experts") / "demo-moe", 1, plan=plan)
