"""Lowering: what rows say is what interventions say, and whatever has no form in vLLM is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.backends.vllm.lowering import gate, lower, places_of
from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import Add, BiasRouter, Custom, ProjectOut, ScaleExperts, SetComponent
from steer.phases import PHASES
from steer.steering import Steering

HIDDEN, EXPERTS, CHOSEN = 4, 6, 2


def towards(site: str, *layers: int, seed: int = 0, scale: float = 1.0) -> Direction:
    vectors = scale * torch.randn(len(layers), HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, layers, site)


def rows(*interventions: Any) -> Any:
    return lower(Steering(interventions), EXPERTS, CHOSEN)


def test_gates_are_open_in_the_states_of_their_phase() -> None:
    assert {phase: gate(phase) for phase in PHASES} == {
        "all": (1, 1, 1, 1),
        "prompt": (1, 0, 0, 0),
        "opening": (0, 1, 0, 0),
        "generated": (0, 1, 1, 1),
        "thinking": (0, 0, 1, 0),
        "answer": (0, 0, 0, 1),
    }
    assert gate("thinking", -0.5) == (0, 0, -0.5, 0)


def test_additions_of_one_place_and_phase_are_summed() -> None:
    one, other = towards("resid_post", 0, 1, seed=1), towards("resid_post", 1, seed=2)
    found = rows(Add(one, "resid_post", coefficient=0.5), Add(other, "resid_post", coefficient=-2.0))
    assert set(found.rows) == {("resid_post", "add", 0), ("resid_post", "add", 1)}
    torch.testing.assert_close(found.rows["resid_post", "add", 0].vector, 0.5 * one[0].float())
    torch.testing.assert_close(found.rows["resid_post", "add", 1].vector, 0.5 * one[1].float() - 2.0 * other[1].float())


def test_the_middle_of_a_layer_is_where_attention_writes() -> None:
    found = rows(Add(towards("resid_mid", 2), "resid_mid"), Add(towards("attn_out", 2, seed=3), "attn_out"))
    (place,) = found.rows
    assert place == ("attn_out", "add", 2)


def test_a_projection_keeps_its_weight_in_the_gate_and_has_length_one() -> None:
    found = rows(ProjectOut(towards("mlp_out", 1, scale=9.0), "mlp_out", weight=0.3, phase="answer"))
    row = found.rows["mlp_out", "project", 1]
    assert row.gate == (0, 0, 0, 0.3) and float(row.vector.norm()) == pytest.approx(1.0)


def test_experts_become_factors_and_forced_choices_become_masks() -> None:
    found = rows(
        BiasRouter(bias=((2, 1, -1.5),), force_in=((2, 0),), force_out=((2, 5), (3, 4)), phase="thinking"),
        ScaleExperts(((2, 1), (2, 3)), 64.0, phase="prompt"),
        ScaleExperts(((2, 3),), 0.5, phase="prompt"),
    )
    scale, bias = found.rows["router", "scale", 2], found.rows["router_logits", "bias", 2]
    assert scale.factors.tolist() == [1, 64, 1, 32, 1, 1] and scale.gate == gate("prompt")
    assert bias.added.tolist() == [0, -1.5, 0, 0, 0, 0] and bias.gate == gate("thinking")
    assert bias.inward.tolist() == [True, *[False] * 5] and bias.outward.tolist() == [*[False] * 5, True]
    assert found.rows["router_logits", "bias", 3].outward.tolist() == [*[False] * 4, True, False]


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        (("all",), (False, True, False)),
        (("prompt",), (False, True, True)),
        (("generated",), (False, False, True)),
        (("thinking", "generated"), (True, False, True)),
        (("opening", "all"), (True, True, True)),
    ],
)
def test_what_the_caches_and_the_tracker_ask(phases: tuple[str, ...], told: tuple[bool, bool, bool]) -> None:
    found = rows(*(Add(towards("resid_post", layer), "resid_post", phase=phase) for layer, phase in enumerate(phases)))
    assert (found.marked, found.first_is_prompt, found.positional) == told


ADD = Add(towards("resid_post", 1), "resid_post")
PROJECT = ProjectOut(towards("resid_post", 1, seed=5), "resid_post")


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ((ADD, PROJECT), "ProjectOut comes after Add at resid_post of layer 1"),
        ((ADD, Add(towards("resid_post", 1), "resid_post", phase="answer")), "2 Add act at resid_post of layer 1 in the phases all, answer"),
        ((PROJECT, ProjectOut(towards("resid_post", 1, seed=6), "resid_post")), "2 ProjectOut act at resid_post of layer 1 one after the other"),
        ((SetComponent(towards("resid_post", 1), "resid_post", value=1.0),), "SetComponent at resid_post has no form in vLLM"),
        ((Add(towards("resid_pre", 1), "resid_pre"),), "Resid_post of layer 0 is the same place"),
        ((ProjectOut(towards("resid_mid", 1), "resid_mid"),), "ProjectOut at resid_mid has no form in vLLM"),
        ((Custom(lambda value, layer: value, "resid_post", (1,)),), "Custom at resid_post has no form in vLLM"),
        ((ScaleExperts(((1, 0),), 2.0, renormalise=True), ScaleExperts(((1, 1),), 2.0)), "2 ScaleExperts act at router of layer 1"),
        ((BiasRouter(force_in=((1, 0),)), BiasRouter(force_in=((1, 1),))), "2 BiasRouter act at router_logits of layer 1"),
        ((ScaleExperts(((1, 0), (1, 3)), 0.0, renormalise=True),), "experts 0, 3 of layer 1 are taken out of the sum"),
    ],
)  # fmt: skip
def test_what_has_no_form_is_refused(interventions: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SteerError, match=f"(?i){message}"):
        rows(*interventions)


def test_sums_that_overflow_are_refused() -> None:
    huge = Add(Direction(torch.full((1, HIDDEN), 3e38), (1,), "resid_post"), "resid_post")
    with pytest.raises(SteerError, match=r"is beyond 1e[+]30"):
        rows(huge, huge)


def test_factors_that_overflow_together_are_refused() -> None:
    with pytest.raises(SteerError, match=r"multiplies weights at router of layer 1 is beyond 1e[+]30"):
        rows(*(ScaleExperts(((1, 0),), 1e30) for _ in range(2)))
    rows(ScaleExperts(((1, 0),), 1e30))


def test_a_projection_before_an_addition_is_the_order_that_vllm_has() -> None:
    assert places_of(Steering((PROJECT, ADD))) == (("resid_post", "add", 1), ("resid_post", "project", 1))
