"""Steered experts, many ways in one batch: factors from 0 to 64, with the sum kept and without, forced choices, phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from steer import Add, BiasRouter, ScaleExperts, Steering
from tests.vllm import cases
from tests.vllm.lab import Ask, Bench

pytestmark = pytest.mark.vllm
NAMED = ((2, 0), (2, 3), (2, 5), (3, 1), (3, 2))


def steerings(width: int) -> dict[str, Steering]:
    """What is done to experts, by name; layers 2 and 3 of the organism have them."""
    scale = ScaleExperts(NAMED, 64.0)
    forced = BiasRouter(force_in=((3, 3), (2, 4)), force_out=((3, 0), (2, 1)))
    beside = Add(cases.direction(width, (1,), "resid_post", 1, norm=2.0), "resid_post")
    return {
        "64": Steering((scale,)),
        "0": Steering((ScaleExperts(NAMED[:1], 0.0),)),
        "tenth": Steering((ScaleExperts(NAMED, 0.1),)),
        "kept": Steering((replace(scale, renormalise=True),)),
        "thinking": Steering((replace(scale, renormalise=True, phase="thinking"), beside)),
        "added": Steering((BiasRouter(bias=((3, 2, 3.0), (2, 0, -2.0))),)),
        "forced": Steering((forced,)),
    }


def test_every_request_has_experts_of_its_own(bench: Callable[[str], Bench]) -> None:
    organism = bench("chain-moe")
    made = replace(organism, steerings=steerings(organism.declared().hidden), undeclared={})
    ways: list[dict[str, object]] = [
        {},
        {"steering": "64"},
        {"steering": "64", "coefficient": 0.5, "phase": "generated"},
        {"steering": "0"},
        {"steering": "tenth"},
        {},
        {"steering": "kept"},
        {"steering": "thinking"},
        {"steering": "added", "phase": "prompt"},
        {"steering": "forced"},
        {"steering": "forced", "phase": "thinking"},
    ]
    prompts = cases.prompts(organism) * 2
    asks = [Ask(prompt, start=start, **way) for way, (prompt, start) in zip(ways, prompts, strict=False)]  # type: ignore[arg-type]
    idle, steered = made.engine([ask.plain for ask in asks], asks).rounds
    made.check_steered(asks)
    made.check(asks, steered)
    assert [idle[0], idle[5]] == [steered[0], steered[5]]
