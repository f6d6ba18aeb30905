"""What an engine is told at start: made from steerings, sent as plain data, and asked by requests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.anatomy.headers import read_headers
from steer.anatomy.resolve import Anatomy, resolve
from steer.backends.vllm.config import KEY, Declared
from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import Add, ScaleExperts
from steer.marks import Marks
from steer.steering import Steering
from tests.steer.backends.vllm.made import MARKS


@cache
def anatomy() -> Anatomy:
    headers = read_headers(Path(__file__).parents[4] / "steer" / "builtin" / "chain-moe")
    return resolve(headers.config, headers.shapes)


def adding(*layers: int, site: str = "resid_post") -> Steering:
    return Steering((Add(Direction(torch.ones(len(layers), anatomy().hidden), layers, site), site),))


def made(**more: Any) -> Declared:
    scaling = Steering((ScaleExperts(((3, 1),), 8.0),))
    return Declared.of(anatomy(), "store", [adding(1, 2), adding(1, site="resid_mid"), scaling], slots=4, **more)


def test_places_are_those_that_steerings_need_and_those_that_were_asked_for() -> None:
    found = made(places=[("mlp_out", "project", 0)], capture=[("resid_post", 1), ("router", 2), ("router", 2)])
    assert found.places == (
        ("attn_out", "add", 1), ("mlp_out", "project", 0), ("resid_post", "add", 1), ("resid_post", "add", 2), ("router", "scale", 3),
    )  # fmt: skip
    assert found.capture == (("resid_post", 1), ("router", 2))
    assert Path(found.store).is_absolute()
    assert (found.hidden, found.layers, found.experts, found.chosen) == (
        anatomy().hidden, anatomy().layers, anatomy().experts, anatomy().chosen,
    )  # fmt: skip
    assert found.parts == {"attn_out": (("self_attn",), 1.0), "mlp_out": (("mlp",), 1.0)}


def test_it_travels_as_plain_data() -> None:
    declared = made(marks=MARKS, endings=[(5, 6), (7,)], capture=[("resid_post", 1)])
    sent = json.loads(json.dumps(declared.to_config()))
    assert Declared.from_config(sent) == declared
    assert Declared.from_config({}) is None and Declared.from_config(None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0"}, "was configured by reasoning-steer 0.0"),
        ({"more": 1}, "more"),
        ({"slots": 0}, "0 slots"),
        ({"places": [["resid_post", "add", 99]]}, r"\(resid_post, add, 99\)"),
        ({"places": [["head_out", "add", 1]]}, r"\(head_out, add, 1\)"),
        ({"places": [["resid_post", "multiply", 1]]}, r"\(resid_post, multiply, 1\)"),
    ],
)
def test_what_nobody_wrote_is_refused(change: dict[str, Any], message: str) -> None:
    plain = made().to_config()
    plain[KEY] |= change
    with pytest.raises(SteerError, match=message):
        Declared.from_config(plain)
    with pytest.raises(SteerError, match=r"what Declared\.to_config returns"):
        Declared.from_config({KEY: "on"})


def test_a_steering_that_needs_another_place_is_refused_by_its_layers() -> None:
    made().check_places(adding(1))
    with pytest.raises(SteerError, match=r"add at resid_post of layers 0, 3, which .* expected layers 1-2"):
        made().check_places(adding(0, 1, 3))
    with pytest.raises(SteerError, match="a place that was declared at start"):
        made().check_places(adding(1, site="mlp_out"))


def test_a_steering_for_another_model_is_refused() -> None:
    narrow = Steering((Add(Direction(torch.ones(1, 3), (1,), "resid_post"), "resid_post"),))
    with pytest.raises(SteerError, match="3"):
        Declared.of(anatomy(), "store", [narrow], slots=1)
    assert made().marks == Marks()


def test_vectors_and_experts_of_another_model_are_refused_before_a_worker_meets_them() -> None:
    narrow = Steering((Add(Direction(torch.ones(1, anatomy().hidden // 2), (1,), "resid_post"), "resid_post"),))
    with pytest.raises(SteerError, match=rf"shape \({anatomy().hidden // 2},\); expected \({anatomy().hidden},\)"):
        made().check_places(narrow)
    with pytest.raises(SteerError, match="names expert 8 of layer 3"):
        made().check_places(Steering((ScaleExperts(((3, 8),), 8.0),)))
