"""What a router returns, the family's rule on other logits, and the proof that a write at a router has its effect."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from accelerate import cpu_offload

import steer
from steer import BiasRouter, ScaleExperts, SteerError, Steering
from steer.routing import Chooser, chosen, returned
from tests.steer import naive_moe
from tests.steer.naive_moe import FAMILIES, Change

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
SCALING, FORCING = Steering((ScaleExperts(((1, 0),), 4.0),)), Steering((BiasRouter(force_in=((1, 0),)),))


def logits(model):
    with torch.no_grad():
        return model.hf(input_ids=IDS, use_cache=False).logits


def refused(model, steering, match):
    with pytest.raises(SteerError, match=match), model.steered(steering):
        pass
    assert not any(module._forward_hooks for module in model.hf.modules())


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 3),
        (torch.zeros(2, 3), torch.zeros(2, 2)),
        (torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.long)),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long)),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 4)),
        (torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long), None),
    ],
)  # fmt: skip
def test_a_router_that_returns_something_else_is_refused(output):
    with pytest.raises(SteerError, match=r"The router of layer 7"):
        chosen(output, "layer 7")


def test_where_every_expert_is_chosen_weights_are_no_logits():
    ids, weights, z = torch.tensor([[1, 0]]), torch.tensor([[0.6, 0.4]]), torch.tensor([[3.0, 4.0]])
    for output in ((z, weights, ids), (ids, weights, z)):
        found = chosen(output, "layer 0")
        assert all(torch.equal(a, b) for a, b in zip(found, (z, weights, ids), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(returned(output, weights, ids, z), output, strict=True)), (
            "in the same order"
        )


def test_what_is_returned_has_the_routers_shapes_and_dtypes():
    output = (torch.zeros(6, 2, dtype=torch.int32), torch.zeros(6, 2, dtype=torch.bfloat16), torch.zeros(6, 4))
    z, weights, ids = torch.rand(2, 3, 4).double(), torch.rand(2, 3, 2), torch.ones(2, 3, 2, dtype=torch.long)
    found = returned(output, weights, ids, z)
    assert all(new is old for new, old in zip(returned(output, weights)[::2], output[::2], strict=True)), "untouched"
    for new, old in zip(found, output, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert torch.equal(found[1], weights.reshape(6, 2).bfloat16()) and (found[0] == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_is_the_familys_own_for_any_logits(tiny, family):
    """Against the naive rule, on logits that no hidden state of the model makes, and past all hooks."""
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    router = model.places.layers[-1].router
    before = {name: part.clone() for name, part in router.state_dict().items()}
    router.register_forward_hook(lambda *args: 1 / 0)
    chooser = Chooser(router, "layer 3")
    z = 3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).double()
    weights, ids = chooser(z.float())
    for row in range(len(z)):
        expected = naive_moe.choose(family, hf.config, router, z[row].float().double().tolist(), Change())
        found = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(dict(zip(*expected, strict=True)), rel=1e-5)
    assert set(router.state_dict()) == set(before)
    assert all(torch.equal(part, before[name]) for name, part in router.state_dict().items())
    assert router.weight.shape == (4, 48)
    if family in naive_moe.SIGMOID:
        moved = torch.zeros(40, 4)
        moved[:, 2] = 9.0
        assert (chooser(z.float(), moved)[1] == 2).any(-1).all()
        assert torch.equal(chooser(z.float())[1], ids), "and the router's own again"
        router.e_score_correction_bias[1] += 9.0  # A change of the buffer is seen.
        assert (chooser(z.float())[1] == 1).any(-1).all()


def test_a_router_without_a_plain_matrix_has_no_rule():
    with pytest.raises(SteerError, match="no plain matrix"):
        Chooser(torch.nn.Identity(), "layer 3")


# The proof.


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_kernel_that_bypasses_its_router_is_refused(tiny, family):
    model = steer.wrap(*tiny(family))
    block = model.places.layers[1].mlp

    def kernel(block, hidden):  # As MegaBlocks' and MXFP4's kernels: it reads the router's matrix and calls no router.
        output = type(block.gate).forward(block.gate, hidden)
        _, weights, ids = chosen(output, "")
        return block.experts(hidden.reshape(-1, 48), ids, weights).reshape(hidden.shape)

    block.forward = MethodType(kernel, block)
    logits(model)
    for steering in (SCALING, FORCING):
        refused(model, steering, "layer 1 of this .* run in one kernel, which bypasses.*use_kernels=False")
    with model.steered(Steering((ScaleExperts(((3, 0),), 4.0),))):
        logits(model)


def test_a_block_that_ignores_what_its_router_returns_is_refused(tiny):
    model = steer.wrap(*tiny("qwen3_moe"))
    block = model.places.layers[1].mlp

    def from_logits(block, hidden):
        z, _, ids = block.gate(hidden.reshape(-1, 48))
        return block.experts(hidden.reshape(-1, 48), ids, z.softmax(-1).gather(1, ids)).reshape(hidden.shape)

    def own_choice(block, hidden):
        z, weights, _ = block.gate(hidden.reshape(-1, 48))
        return block.experts(hidden.reshape(-1, 48), z.topk(2).indices, weights).reshape(hidden.shape)

    def squared(block, hidden):
        _, weights, ids = block.gate(hidden.reshape(-1, 48))
        return block.experts(hidden.reshape(-1, 48), ids, weights**2).reshape(hidden.shape)

    for forward, match in (
        (from_logits, "ignores the weights"),
        (own_choice, "ignores the experts"),
        (squared, "does not add its experts up"),
    ):
        block.forward = MethodType(forward, block)
        for steering in (SCALING, FORCING):
            refused(model, steering, f"layer 1 of this qwen3_moe model {match}")


def test_a_rule_that_does_not_reproduce_the_choice_is_refused_where_it_is_needed(tiny):
    model = steer.wrap(*tiny("qwen3_moe"))
    router = model.places.layers[1].router
    forward = type(router).forward

    def hidden_rule(router, hidden):  # A choice by more than the logits that are returned.
        z, weights, ids = forward(router, hidden + 1)
        return z - hidden.reshape(-1, 48)[:, :4], weights, ids

    router.forward = MethodType(hidden_rule, router)
    refused(model, FORCING, "applied again to the logits that it returned, gives another choice.*Use ScaleExperts")
    with model.steered(SCALING):
        logits(model)


def test_a_record_that_names_another_router_is_refused(tiny):
    model = steer.wrap(*tiny("mixtral"))
    router = model.places.layers[1].router
    forward = type(router).forward

    def wider(router, hidden):
        z, weights, ids = forward(router, hidden)
        return torch.cat([z, z], 1), weights, ids

    router.forward = MethodType(wider, router)
    refused(model, SCALING, r"returned logits of shape \(8, 8\) for 8 tokens")


def test_the_proof_is_made_once_per_layer_and_is_heard_by_none_of_our_readers(tiny):
    model = steer.wrap(*tiny("qwen3_moe"))
    calls, seen = [], []
    model.places.layers[1].router.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with (
        model.read(
            lambda site, layer, value, states: seen.append((site, layer)), {"mlp_out": [1], "router_logits": [1]}
        ),
        model.hear(lambda layer, routing, states: seen.append(("router", layer)), [1]),
    ):
        with model.steered(SCALING):
            assert calls == [8] * 4 and not seen
            logits(model)
        with model.steered(SCALING), model.steered(SCALING):
            assert len(calls) == 5
            logits(model)
    assert calls == [8] * 4 + [7] * 2 and seen == [("router_logits", 1), ("router", 1), ("mlp_out", 1)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_proven_in_every_dtype(tiny, family, dtype):
    hf, tokenizer = tiny(family, dtype=dtype)
    hf.set_experts_implementation("eager")
    model = steer.wrap(hf, tokenizer, self_check=dtype != torch.float16)
    for layer in model.anatomy.expert_layers:
        with model.steered(Steering((BiasRouter(((layer, 0, 0.5),)), ScaleExperts(((layer, 0),), 2.0)))):
            assert logits(model).isfinite().all()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_an_offloaded_model_is_steered_alike(tiny, family):
    model = steer.wrap(*tiny(family))
    layer = model.anatomy.expert_layers[-1]
    both = Steering((BiasRouter(force_in=((layer, 3),)), ScaleExperts(((layer, 3),), 2.0)))
    with model.steered(both):
        expected = logits(model)
    for buffers in (False, True):
        hf, tokenizer = tiny(family)
        cpu_offload(hf, execution_device=torch.device("cpu"), offload_buffers=buffers)
        away = steer.wrap(hf, tokenizer)
        with away.steered(both):
            torch.testing.assert_close(logits(away), expected, rtol=0, atol=1e-6)
