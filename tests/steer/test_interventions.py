from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.directions import Direction
from steer.expert_interventions import BiasRouter, ScaleExperts
from steer.interventions import Add, Custom, Intervention, ProjectOut, SetComponent, check_coefficient, delta, prepared
from steer.phases import PHASES
from steer.sites import SITES
from tests.steer.made import HEADS, HIDDEN, SEEDS, WIDTH, direction, refused

STRENGTHS = st.floats(-8, 8)
PLACES = st.sampled_from(["attn_out", "z"])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def activations(seed: int, site: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (2, 3, HEADS, WIDTH) if site == "z" else (2, 3, HIDDEN)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) * 3).to(dtype)


def at(site: str, seed: int = 0) -> Direction:
    return direction(seed, site="z" if site == "z" else "resid_mid")


def naive(kind: str, v: np.ndarray, h: np.ndarray, strength: float) -> np.ndarray:
    """The table of DESIGN §2 in loops over single vectors, float64; returns the new activation."""
    rows, vectors = h.reshape(-1, h.shape[-1]), np.broadcast_to(v, h.shape).reshape(-1, h.shape[-1])
    after = []
    for row, vector in zip(rows, vectors, strict=True):
        unit = vector / math.sqrt(sum(x * x for x in vector))
        along = sum(a * b for a, b in zip(unit, row, strict=True))
        after.append(
            {
                "add": row + strength * vector,
                "project": row - strength * along * unit,
                "set": row - along * unit + strength * unit,
            }[kind]
        )
    return np.array(after).reshape(h.shape)


def made(kind: str, site: str, strength: float, seed: int = 0) -> Intervention:
    d = at(site, seed)
    return {
        "add": Add(d, site, strength),
        "project": ProjectOut(d, site, strength),
        "set": SetComponent(d, site, strength),
    }[kind]


# The formula.


@given(SEEDS, PLACES, st.sampled_from(["add", "project", "set"]), STRENGTHS)
def test_delta_is_the_table_done_naively(seed: int, site: str, kind: str, strength: float) -> None:
    intervention, h = made(kind, site, strength, seed), activations(seed + 1, site)
    for row, layer in enumerate((1, 2, 5)):
        expected = naive(kind, at(site, seed).vectors[row].double().numpy(), h.numpy(), strength)
        np.testing.assert_allclose((h + delta(intervention, layer, h)).numpy(), expected, rtol=1e-12, atol=1e-12)


@given(SEEDS, PLACES, st.sampled_from(["add", "project"]), STRENGTHS, STRENGTHS)
def test_the_coefficient_is_a_factor(seed: int, site: str, kind: str, strength: float, c: float) -> None:
    h = activations(seed, site)
    once, folded = delta(made(kind, site, strength), 2, h, c), delta(made(kind, site, c * strength), 2, h)
    np.testing.assert_allclose(once.numpy(), folded.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["add", "project", "set"])
@pytest.mark.parametrize("site", ["attn_out", "z"])
def test_precision_is_float32_or_wider(site: str, kind: str, dtype: torch.dtype) -> None:
    h = activations(4, site, dtype)
    found = delta(made(kind, site, 0.7), 1, h)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == h.shape
    exact = naive(kind, at(site).vectors[0].double().numpy(), h.double().numpy(), 0.7) - h.double().numpy()
    np.testing.assert_allclose(found.double().numpy(), exact, atol=2e-6)


@given(SEEDS, PLACES)
def test_projecting_out_twice_is_once(seed: int, site: str) -> None:
    project, h = made("project", site, 1.0, seed), activations(seed + 1, site)
    once = h + delta(project, 1, h)
    np.testing.assert_allclose((once + delta(project, 1, once)).numpy(), once.numpy(), atol=1e-12)
    np.testing.assert_allclose((once * at(site, seed)[1].double()).sum(-1).numpy(), 0, atol=1e-12)


@given(SEEDS, PLACES, st.floats(-2, 2))
def test_the_component_shrinks_by_one_minus_w_and_nothing_else_changes(seed: int, site: str, w: float) -> None:
    h, v = activations(seed + 1, site), at(site, seed)[2].double()
    after = h + delta(made("project", site, w, seed), 2, h)
    np.testing.assert_allclose((after * v).sum(-1).numpy(), (1 - w) * (h * v).sum(-1).numpy(), atol=1e-10)
    other = torch.from_numpy(np.random.default_rng(seed).standard_normal(v.shape))
    other = other - (other * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True) * v
    np.testing.assert_allclose((after * other).sum(-1).numpy(), (h * other).sum(-1).numpy(), atol=1e-10)


@given(SEEDS, PLACES, STRENGTHS)
def test_the_component_becomes_what_was_set(seed: int, site: str, value: float) -> None:
    h = activations(seed + 1, site)
    after = h + delta(made("set", site, value, seed), 5, h)
    unit = at(site, seed).unit()[5].double()
    np.testing.assert_allclose((after * unit).sum(-1).numpy(), value, atol=1e-5)
    np.testing.assert_allclose(
        (after + delta(made("set", site, value, seed), 5, after)).numpy(), after.numpy(), atol=1e-12
    )


@given(SEEDS, st.sampled_from(["add", "project", "set"]), STRENGTHS)
def test_rotating_the_space_rotates_the_change(seed: int, kind: str, strength: float) -> None:
    rotation = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((HIDDEN, HIDDEN))))[0]
    d, h = at("attn_out", seed), activations(seed + 1, "attn_out")
    turned = replace(d, vectors=d.vectors.double() @ rotation)
    plain = made(kind, "attn_out", strength, seed)
    found = delta(replace(plain, direction=turned), 1, h @ rotation)
    np.testing.assert_allclose(found.numpy(), (delta(plain, 1, h) @ rotation).numpy(), atol=1e-5)


@given(SEEDS, PLACES, st.sampled_from([-1.0, 2.0, -0.125, 2.0**40]))
def test_projection_sees_neither_sign_nor_length(seed: int, site: str, factor: float) -> None:
    h = activations(seed + 1, site, torch.float32)
    plain = made("project", site, 0.6, seed)
    assert torch.equal(delta(plain, 1, h), delta(replace(plain, direction=plain.direction * factor), 1, h))


def test_heads_do_not_see_each_other_at_z() -> None:
    h = activations(1, "z")
    for kind in ("project", "set"):
        whole = delta(made(kind, "z", 0.5), 1, h)
        changed = h.clone()
        changed[..., 0, :] += 1
        assert torch.equal(delta(made(kind, "z", 0.5), 1, changed)[..., 1:, :], whole[..., 1:, :])


def test_rows_do_not_see_each_other() -> None:
    h = activations(2, "attn_out", torch.float32)
    for kind in ("add", "project", "set"):
        whole = delta(made(kind, "attn_out", 0.5), 1, h)
        for batch in range(2):
            assert torch.equal(delta(made(kind, "attn_out", 0.5), 1, h[batch]), whole[batch])


def test_the_activation_is_left_alone() -> None:
    for kind in ("add", "project", "set"):
        h = activations(2, "attn_out")
        before = h.clone()
        delta(made(kind, "attn_out", 2.0), 1, h)
        assert torch.equal(h, before)


def test_a_custom_function_gets_the_wide_activation_and_the_layer() -> None:
    seen: list[tuple[torch.dtype, int]] = []

    def double(h: torch.Tensor, layer: int) -> torch.Tensor:
        seen.append((h.dtype, layer))
        return h

    h = activations(0, "attn_out", torch.bfloat16)
    found = delta(Custom(double, "attn_out", (3,)), 3, h)
    assert seen == [(torch.float32, 3)]
    assert torch.equal(found, h.float())


def test_a_prepared_change_can_be_used_again() -> None:
    change = prepared(made("project", "attn_out", 1.0), 1, 0.5, torch.float32)
    for seed in range(3):
        h = activations(seed, "attn_out", torch.float32)
        assert torch.equal(change(h), delta(made("project", "attn_out", 1.0), 1, h, 0.5))


# Doing nothing.


@pytest.mark.parametrize(("c", "strength"), [(0.0, 3.0), (3.0, 0.0), (-0.0, 1.0), (0.0, 0.0), (1e-200, 1e-200)])
@pytest.mark.parametrize("kind", ["add", "project"])
def test_nothing_to_do_can_be_seen(kind: str, c: float, strength: float) -> None:
    assert made(kind, "attn_out", strength).is_zero(c)


def test_something_to_do_can_be_seen() -> None:
    assert not made("add", "attn_out", 0.5).is_zero(1.0)
    assert not made("project", "attn_out", -0.5).is_zero(1.0)
    assert not made("set", "attn_out", 0.0).is_zero(1.0)
    assert not Custom(lambda h, layer: h, "attn_out", (0,)).is_zero(1.0)


@pytest.mark.parametrize("c", [0.0, 0.5, -1.0, 2.0])
@pytest.mark.parametrize("kind", ["set", "custom"])
def test_a_coefficient_without_meaning_is_refused(kind: str, c: float) -> None:
    custom = Custom(lambda h, layer: h, "attn_out", (1,))
    intervention = custom if kind == "custom" else made("set", "attn_out", 1.0)
    refused(lambda: check_coefficient(intervention, c), type(intervention).__name__, "leave the coefficient out")
    refused(lambda: delta(intervention, 1, activations(0, "attn_out"), c), "coefficient")
    check_coefficient(intervention, 1.0)


@pytest.mark.parametrize("c", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["add", "project", "set"])
def test_a_coefficient_is_finite(kind: str, c: float) -> None:
    refused(lambda: check_coefficient(made(kind, "attn_out", 1.0), c), "finite")


# Construction.

MAKERS: list[Callable[..., Intervention]] = [
    Add,
    ProjectOut,
    lambda d, site, **given_: SetComponent(d, site, 1.0, **given_),
]


@pytest.mark.parametrize("maker", MAKERS)
def test_what_all_three_refuse(maker: Callable[..., Intervention]) -> None:
    d = direction()
    refused(lambda: maker(d, "routing"), "no site 'routing'")
    for routing in ("router", "router_logits"):
        refused(lambda routing=routing: maker(d, routing), f"at {routing}", "BiasRouter")
        refused(lambda routing=routing: direction(site=routing), routing, "experts are chosen")
    refused(lambda: maker(d, "attn_out", phase="later"), "phase 'later'", *PHASES)
    refused(lambda: maker(d, "attn_out", layers=(1, 3)), "layer 3", "1-2, 5")
    refused(lambda: maker(d, "attn_out", layers=()), "no layers")
    refused(lambda: maker(d, "z"), "resid_mid", "is used at z")
    refused(lambda: maker(direction(site="z"), "attn_out"), "measured at z")


@pytest.mark.parametrize("maker", MAKERS)
def test_layers_have_one_form(maker: Callable[..., Intervention]) -> None:
    d = direction()
    assert maker(d, "attn_out") == maker(d, "attn_out", layers=(5, 2, 1)) == maker(d, "attn_out", layers=(1, 2, 2, 5))
    assert maker(d, "attn_out").active_layers == (1, 2, 5)
    assert maker(d, "attn_out", layers=(5,)).active_layers == (5,)
    assert hash(maker(d, "attn_out")) == hash(maker(direction(), "attn_out"))
    assert maker(d, "attn_out") != maker(d, "attn_out", phase="thinking")
    assert maker(d, "attn_out") != maker(direction(1), "attn_out")


@pytest.mark.parametrize("site", [name for name, place in SITES.items() if place.has_vectors and name != "z"])
def test_a_direction_may_be_used_at_every_site_of_its_width(site: str) -> None:
    for maker in MAKERS:
        assert maker(direction(site="resid_mid"), site).site == site


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_strengths_are_finite(bad: float) -> None:
    refused(lambda: Add(direction(), "attn_out", bad), "coefficient")
    refused(lambda: ProjectOut(direction(), "attn_out", bad), "weight")
    refused(lambda: SetComponent(direction(), "attn_out", bad), "value")


def test_only_projection_is_at_home_at_head_out() -> None:
    d = direction()
    makers: list[Callable[[], Any]] = [
        lambda: Add(d, "head_out"),
        lambda: SetComponent(d, "head_out", 1.0),
        lambda: Custom(lambda h, layer: h, "head_out", (1,)),
    ]
    for make in makers:
        refused(make, "head_out", "attn_raw")
    refused(lambda: ProjectOut(d, "head_out"), "no heads", "scores.top")
    refused(lambda: ProjectOut(d, "attn_out", heads=((1, 0),)), "names heads", "head_out")
    refused(lambda: ProjectOut(d, "head_out", heads=()), "no heads")
    refused(lambda: ProjectOut(d, "head_out", heads=((1, 0), (1, 0))), "once")
    refused(lambda: ProjectOut(d, "head_out", heads=((1, -1),)), "from 0")
    refused(lambda: ProjectOut(d, "head_out", heads=((3, 0),)), "layer 3")
    refused(lambda: ProjectOut(d, "head_out", heads=((1, 0),), layers=(1, 2)), "layers [1, 2]", "Leave layers out")
    refused(lambda: ProjectOut(direction(site="z"), "head_out", heads=((1, 0),)), "measured at z")


def test_heads_have_one_form() -> None:
    d = direction()
    project = ProjectOut(d, "head_out", heads=((5, 2), (1, 3), (1, 0)))
    assert project.heads == ((1, 0), (1, 3), (5, 2))
    assert project.active_layers == (1, 5)
    assert project == ProjectOut(d, "head_out", heads=((1, 0), (1, 3), (5, 2)), layers=(1, 5)) == replace(project)
    with pytest.raises(ValueError, match="made of weights"):
        delta(project, 1, torch.zeros(1, HIDDEN))


def test_a_zero_vector_has_no_unit() -> None:
    vectors = direction().vectors.clone()
    vectors[1] = 0
    d = replace(direction(), vectors=vectors)
    refused(lambda: ProjectOut(d, "attn_out"), "layer 2", "projected out")
    refused(lambda: SetComponent(d, "attn_out", 0.0), "layer 2")
    refused(lambda: ProjectOut(d, "head_out", heads=((2, 0),)), "layer 2")
    assert ProjectOut(d, "attn_out", layers=(1, 5)).active_layers == (1, 5)
    assert not delta(Add(d, "attn_out"), 2, torch.ones(1, HIDDEN)).any()


def test_what_is_done_to_a_router_has_a_coefficient_but_no_addition() -> None:
    scaled, biased = ScaleExperts(((1, 0), (1, 2)), 4.0), BiasRouter(force_in=((1, 0),))
    for c in (0.0, 1.0, 2.0, -1 / 3):
        check_coefficient(scaled, c)
    refused(lambda: check_coefficient(scaled, -0.5), "multiplies weights by -0.5")
    check_coefficient(biased, 1.0)
    refused(lambda: check_coefficient(biased, 0.5), "BiasRouter", "coefficient 1")
    for intervention in (scaled, biased):
        refused(lambda intervention=intervention: check_coefficient(intervention, math.nan), "finite")
        for formula in (prepared, delta):
            given: Any = torch.float32 if formula is prepared else torch.zeros(1, HIDDEN)
            with pytest.raises(ValueError, match="no addition to an activation"):
                formula(intervention, 1, *((1.0, given) if formula is prepared else (given,)))


def test_custom_names_its_layers() -> None:
    refused(lambda: Custom(lambda h, layer: h, "attn_out", ()), "layers")
    refused(lambda: Custom(lambda h, layer: h, "attn_out", (-1,)), "from 0")
    refused(lambda: Custom(lambda h, layer: h, "router", (0,)), "experts are chosen")
    refused(lambda: Custom(lambda h, layer: h, "attn_out", (0,), phase="soon"), "no phase")
    assert Custom(lambda h, layer: h, "attn_out", (4, 0, 4)).active_layers == (0, 4)


def test_numbers_have_one_form() -> None:
    for kind in ("add", "project", "set"):
        assert (
            repr(made(kind, "attn_out", -0.0)) == repr(made(kind, "attn_out", 0)) == repr(made(kind, "attn_out", 0.0))
        )


def test_values_are_frozen() -> None:
    for kind in ("add", "project", "set"):
        with pytest.raises(AttributeError):
            made(kind, "attn_out", 1.0).site = "z"  # type: ignore[misc]
