"""Routers that look their change up, token by token, against the naive choice of the families, in plain Python."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.backends.vllm import routers
from steer.backends.vllm.lowering import Lowered, Row, gate
from steer.backends.vllm.tables import WIDTH, Tables
from steer.errors import SteerError
from steer.phases import PHASES, State, phase_mask
from tests.steer.backends.vllm import fakes
from tests.steer.naive_moe import Change, choose

STATES = (State.PROMPT, State.OPENING, State.THINKING, State.ANSWER)
TOKENS, SLOTS = 8, 3
SCALE, BIAS = ("router", "scale", 0), ("router_logits", "bias", 0)
FAMILIES = ("qwen3_moe", "olmoe", "deepseek_v3")

experts = st.integers(0, fakes.EXPERTS - 1)
factors = st.dictionaries(experts, st.sampled_from([0.1, 0.5, 2.0, 64.0]), max_size=3)
changes = st.builds(
    lambda bias, forced, inward, scaled, renormalise, phase: (
        Change(bias, tuple(forced[:inward]), tuple(forced[inward:]), scaled, renormalise),
        phase,
    ),
    st.dictionaries(experts, st.floats(-3, 3).filter(bool), max_size=3),
    st.lists(experts, unique=True, max_size=2),
    st.integers(0, 2),
    factors,
    st.booleans(),
    st.sampled_from(PHASES),
)


def row_of(change: Change, phase: str) -> dict[Any, Row]:
    scaled, added = torch.ones(fakes.EXPERTS), torch.zeros(fakes.EXPERTS)
    inward, outward = (torch.zeros(fakes.EXPERTS, dtype=torch.bool) for _ in range(2))
    for expert, factor in change.factors.items():
        scaled[expert] = factor
    for expert, number in change.bias.items():
        added[expert] = number
    inward[list(change.force_in)] = True
    outward[list(change.force_out)] = True
    return {
        SCALE: Row(gate(phase), factors=scaled, renormalise=change.renormalise),
        BIAS: Row(gate(phase), added=added, inward=inward, outward=outward),
    }


def router_of(family: str) -> tuple[Any, Any]:
    """vLLM's router by formulas of its own, and what the naive choice needs of a configuration."""
    config = {"num_experts_per_tok": fakes.CHOSEN, "norm_topk_prob": family != "olmoe"}
    if family != "deepseek_v3":
        return fakes.FusedTopKRouter(family != "olmoe"), SimpleNamespace(**config)
    bias = torch.linspace(-0.4, 0.3, fakes.EXPERTS)
    return fakes.GroupedTopKRouter(bias), SimpleNamespace(
        **config, n_group=2, topk_group=1, routed_scaling_factor=2.5, e_score_correction_bias=bias
    )


def installed(router: Any, tables: Tables) -> None:
    layer = torch.nn.Module()
    layer.experts = fakes.Experts(router)
    routers.install({0: layer}, tables)


@settings(max_examples=25, deadline=None)
@given(family=st.sampled_from(FAMILIES), given=st.lists(changes, max_size=SLOTS), seed=st.integers(0, 99))
def test_every_token_is_routed_by_its_own_slot_and_state(family: str, given: list[Any], seed: int) -> None:
    router, config = router_of(family)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, fakes.EXPERTS, generator=generator)
    tables = fakes.tables_of((SCALE, BIAS), slots=SLOTS)
    plain, plain_ids = router._compute_routing(logits, logits, None)
    installed(router, tables)
    lowered = {str(number): Lowered(row_of(*each), True, True, True) for number, each in enumerate(given)}
    slots = [0, *tables.slots_of(lowered).values()]
    which = torch.randint(len(slots), (TOKENS,), generator=generator).tolist()
    states = torch.randint(4, (TOKENS,), generator=generator).tolist()
    tables.tell(torch.tensor([slots[slot] * WIDTH + state for slot, state in zip(which, states, strict=True)]))
    weights, ids = router.select_experts(logits, logits)
    for token in range(TOKENS):
        change, phase = given[which[token] - 1] if which[token] else (Change(), "all")
        if not which[token] or not bool(phase_mask(torch.tensor([[STATES[states[token]]]]), phase)):
            assert torch.equal(weights[token], plain[token]) and torch.equal(ids[token], plain_ids[token])
            continue
        chosen, expected = choose(family, config, config, logits[token].double().tolist(), change)
        assert dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True)) == pytest.approx(
            dict(zip(chosen, expected, strict=True)), rel=2e-5, abs=1e-7
        )


def test_powers_of_two_are_exact_and_a_factor_is_not_rounded_twice() -> None:
    tables = fakes.tables_of((SCALE,))
    values = torch.tensor([64.0, 0.1, 0.0, 1e-30, 1e30, 1.0, 3.0, 0.5])
    (slot,) = tables.slots_of({"a": Lowered({SCALE: Row(gate("all"), factors=values)}, False, True, False)}).values()
    assert torch.equal(tables.at[SCALE]["factors"][slot], values)
    weights, ids = torch.rand(1, 8), torch.arange(8).unsqueeze(0)
    code = torch.tensor([slot * WIDTH])
    assert torch.equal(routers.scaled(weights, ids, tables.at[SCALE], code, torch.tensor([slot])), weights * values)


def test_padding_that_chose_nothing_stays() -> None:
    tables = fakes.tables_of((SCALE,))
    weights, ids = torch.zeros(2, 2), torch.full((2, 2), -1, dtype=torch.int32)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(routers.scaled(weights, ids, tables.at[SCALE], zeros, zeros), weights)


def test_two_routers_in_a_layer_are_refused() -> None:
    layer = torch.nn.Module()
    layer.one, layer.other = (fakes.Experts(fakes.FusedTopKRouter()) for _ in range(2))
    with pytest.raises(SteerError, match="has 2 routers"):
        routers.install({0: layer}, fakes.tables_of((SCALE,)))
    shared = fakes.FusedTopKRouter()
    layer.one.router = layer.other.router = shared
    routers.install({0: layer}, fakes.tables_of((SCALE,)))


def test_a_router_that_also_chooses_shared_experts_is_refused() -> None:
    router = fakes.FusedTopKRouter()
    router.num_fused_shared_experts = 1  # type: ignore[attr-defined]
    with pytest.raises(SteerError, match="layer 0 also chooses shared experts"):
        installed(router, fakes.tables_of((SCALE,)))
