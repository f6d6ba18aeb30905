"""Writes at every site of every family against the naive two-branch rewrite in `naive.py`; nothing is left behind."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Custom, Direction, ProjectOut, SetComponent, SteerError, Steering
from tests.steer import naive
from tests.tiny import FAMILIES

DENSE = [
    family for family, settings in FAMILIES.items() if "num_experts_per_tok" not in settings
]  # Experts have no float64.
LAYERS = (1, 3)
IDS = [[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3]]


def logits(hf, ids=IDS):
    with torch.no_grad():
        return hf(input_ids=torch.tensor(ids), use_cache=False).logits


def direction(model, site, layers=LAYERS, seed=0):
    anatomy = model.anatomy
    width = (anatomy.heads, anatomy.head_width) if site == "z" else (anatomy.hidden,)
    vectors = torch.randn(len(layers), *width, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, layers, site)


def layers_at(model, site):
    """Layers 1 and 3 where they have the site, else the first that does."""
    having = model.anatomy.site_layers(site)
    return tuple(layer for layer in LAYERS if layer in having) or having[:1]


def cases(d, site):
    yield Add(d, site, coefficient=0.7), lambda v: naive.add(v, 0.7)
    yield ProjectOut(d, site, weight=0.9), lambda v: naive.project_out(v, 0.9)
    yield SetComponent(d, site, value=1.5), lambda v: naive.set_component(v, 1.5)
    yield Custom(lambda h, layer: h.tanh() * (layer + 1), site, d.layers), None


@pytest.mark.parametrize("site", naive.SITES)
@pytest.mark.parametrize("family", DENSE)
def test_every_write_equals_the_definition_in_float64(tiny, family, site):
    hf, tokenizer = tiny(family, dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, site, layers_at(model, site))
    plain = logits(hf)
    for intervention, formula in cases(d, site):
        with model.steered(Steering((intervention,))):
            hooked = logits(hf)
        edits = {
            (layer, site): formula(d[layer]) if formula else (lambda h, layer=layer: h + h.tanh() * (layer + 1))
            for layer in d.layers
        }
        with naive.rewritten(hf, edits):
            expected = logits(hf)
        assert (expected - plain).abs().max() > 1e-3, "the edit does something"
        torch.testing.assert_close(hooked, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", naive.SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_write_equals_the_definition_in_float32(tiny, family, site):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    if not model.anatomy.site_layers(site):
        return  # Experts everywhere: `test_mlp_raw_exists_on_dense_layers_only` has the refusal.
    d = direction(model, site, layers_at(model, site))
    with model.steered(Steering((ProjectOut(d, site), Add(d, site, coefficient=0.5))), coefficient=0.6):
        hooked = logits(hf)
    formulas = {layer: (naive.project_out(d[layer], 0.6), naive.add(d[layer], 0.3)) for layer in d.layers}
    with naive.rewritten(hf, {(layer, site): lambda h, f=both: f[1](f[0](h)) for layer, both in formulas.items()}):
        expected = logits(hf)
    torch.testing.assert_close(hooked, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", DENSE)
def test_head_out_projects_each_heads_own_write(tiny, family):
    hf, tokenizer = tiny(family, dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d, e = direction(model, "resid_mid"), direction(model, "resid_mid", seed=1)
    heads = ((1, 0), (1, 3), (3, 2))
    steering = Steering(
        (ProjectOut(d, "head_out", heads=heads), ProjectOut(e, "head_out", weight=0.5, heads=((1, 3),)))
    )
    with model.steered(steering, coefficient=0.8):
        hooked = logits(hf)

    def both(h):
        return naive.project_out(e[1], 0.4)(naive.project_out(d[1], 0.8)(h))

    edits = {
        (1, "head_out 0"): naive.project_out(d[1], 0.8),
        (1, "head_out 3"): both,
        (3, "head_out 2"): naive.project_out(d[3], 0.8),
    }
    with naive.rewritten(hf, edits):
        expected = logits(hf)
    torch.testing.assert_close(hooked, expected, rtol=1e-6, atol=1e-6)  # The factors are float32.


def test_head_out_edits_that_overlap_compose_over_contexts(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    first, second = (
        Steering((ProjectOut(direction(model, "resid_mid", seed=s), "head_out", heads=((1, 2),)),)) for s in (0, 1)
    )
    with model.steered(Steering(first.interventions + second.interventions)):
        together = logits(hf)
    with model.steered(first), model.steered(second):
        nested = logits(hf)
    with model.steered(second), model.steered(first):
        reversed_order = logits(hf)
    torch.testing.assert_close(nested, together, rtol=0, atol=0)
    assert (nested - reversed_order).abs().max() > 1e-6


def test_head_out_follows_a_weight_that_changes_inside_the_context(tiny):
    hf, tokenizer = tiny("llama", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    steering = Steering((ProjectOut(direction(model, "resid_mid"), "head_out", heads=((1, 2),)),))
    with model.steered(steering):
        logits(hf)
        with torch.no_grad():
            model.parameter("attention_output", 1).mul_(0.5)
        inside = logits(hf)
    with model.steered(steering):
        fresh = logits(hf)
    torch.testing.assert_close(inside, fresh, rtol=0, atol=0)


def test_head_out_of_two_phases_on_one_head_is_refused(tiny):
    model = steer.wrap(*tiny("qwen3"))
    d = direction(model, "resid_mid")
    clash = Steering(
        (
            ProjectOut(d, "head_out", heads=((1, 2),)),
            ProjectOut(d, "head_out", heads=((1, 1), (1, 2)), phase="thinking"),
        )
    )
    with pytest.raises(SteerError, match=r"(?i)head 2 of layer 1"), model.steered(clash):
        pass
    assert hooks_on(model.hf) == 0
    apart = Steering(
        (ProjectOut(d, "head_out", heads=((1, 2),)), ProjectOut(d, "head_out", heads=((1, 1),), phase="generated"))
    )
    with model.steered(apart):
        model.run(IDS, [3, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_zero_changes_not_a_bit(tiny, family, dtype):
    hf, tokenizer = tiny(family, dtype=dtype)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "resid_mid")
    plain = logits(hf)
    sites = ("resid_pre", "attn_raw", "attn_out", "resid_mid", "mlp_out", "resid_post")
    steering = Steering((*(Add(d, site) for site in sites), ProjectOut(d, "head_out", heads=((1, 0), (3, 1)))))
    with model.steered(steering, coefficient=0.0) as report:
        same = logits(hf)
    assert torch.equal(same, plain)
    assert report.positions == 0 and "zero" in report.idle


def test_order_is_forward_across_sites_and_tuple_order_within(tiny):
    hf, tokenizer = tiny("llama", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "resid_post", seed=2)
    pair = (SetComponent(d, "resid_post", value=2.0), Add(d, "resid_post", coefficient=3.0))
    results = []
    for order in (pair, pair[::-1]):
        with model.steered(Steering(order)):
            results.append(logits(hf))
        with model.steered(Steering((order[0],))), model.steered(Steering((order[1],))):
            torch.testing.assert_close(logits(hf), results[-1], rtol=1e-12, atol=1e-12)
    assert (results[0] - results[1]).abs().max() > 1e-3
    across = (Add(d, "resid_post"), Custom(lambda h, layer: h.tanh(), "resid_pre", LAYERS), ProjectOut(d, "attn_out"))
    with model.steered(Steering(across)):
        one = logits(hf)
    with model.steered(Steering(across[::-1])):
        torch.testing.assert_close(logits(hf), one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer", ["reader", "writer"])
def test_readers_see_the_result_whatever_was_entered_first(tiny, outer):
    hf, tokenizer = tiny("granite", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "attn_out")
    steering = Steering((Add(d, "attn_out"), ProjectOut(d, "resid_mid"), Add(d, "resid_post")))
    wanted = {"resid_pre": None, "attn_out": None, "resid_mid": None, "mlp_out": None, "resid_post": None}
    writer, reader = model.steered(steering), model.capture(wanted)
    if outer == "reader":
        with reader as acts, writer:
            logits(hf)
    else:
        with writer, reader as acts:
            logits(hf)
    for layer in range(4):
        torch.testing.assert_close(
            acts["resid_mid"][layer], acts["resid_pre"][layer] + acts["attn_out"][layer], rtol=0, atol=1e-12
        )
    along = (acts["resid_mid"][1] * naive.unit(d[1].double())).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-9)
    added = acts["resid_post"][1] - acts["resid_mid"][1] - acts["mlp_out"][1]
    torch.testing.assert_close(added, d[1].double().expand_as(added), rtol=0, atol=1e-12)


def hooks_on(hf):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules())


def fingerprint(hf):
    return {
        name: (
            sorted(module.__dict__),
            sorted(module._buffers),
            sorted(module._parameters),
            type(module),
            module.forward,
        )
        for name, module in hf.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_nothing_is_left_on_the_model_even_after_an_exception(tiny, family):
    hf, tokenizer = tiny(family)
    before = fingerprint(hf)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "resid_mid")
    steering = Steering((ProjectOut(d, "resid_mid"), Add(d, "resid_post"), ProjectOut(d, "head_out", heads=((1, 1),))))
    plain = logits(hf)
    with model.steered(steering), model.capture({"z": None, "mlp_out": None}):
        logits(hf)
        assert hooks_on(hf) > 0
    assert hooks_on(hf) == 0 and fingerprint(hf) == before

    def fail(site, layer, value, states):
        raise RuntimeError("in the middle of a forward pass")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        model.steered(steering),
        model.read(fail, {"attn_raw": [2]}),
    ):
        logits(hf)
    assert hooks_on(hf) == 0 and fingerprint(hf) == before
    assert not model.taps._contexts and not model.taps._residual and not model.taps._positions
    assert torch.equal(logits(hf), plain)


def test_a_context_that_ends_first_leaves_the_other_in_force(tiny):
    hf, tokenizer = tiny("qwen2")
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "resid_post")
    one, two = model.steered(Steering((Add(d, "resid_post"),))), model.steered(Steering((ProjectOut(d, "attn_out"),)))
    one.__enter__()
    two.__enter__()
    logits(hf)
    one.__exit__(None, None, None)
    left = logits(hf)
    two.__exit__(None, None, None)
    with model.steered(Steering((ProjectOut(d, "attn_out"),))):
        torch.testing.assert_close(left, logits(hf), rtol=0, atol=0)
    assert hooks_on(hf) == 0


def test_bf16_adds_in_float32_and_casts_once(tiny):
    hf, tokenizer = tiny("llama", dtype=torch.bfloat16)
    model = steer.wrap(hf, tokenizer)
    d = direction(model, "resid_post")
    small = Steering((Add(d, "resid_post", coefficient=0.003), Add(d, "resid_post", coefficient=0.003)))
    with model.capture({"resid_post": [1]}) as plain:
        logits(hf)
    with model.capture({"resid_post": [1]}) as steered, model.steered(small):
        logits(hf)
    before = plain["resid_post"][1]
    expected = (before.double() + 2 * 0.003 * d[1].double()).to(torch.bfloat16)
    same = (steered["resid_post"][1] == expected).double().mean()
    assert same > 0.999  # Float32 and float64 round alike but for ties.
    twice = ((before + (0.003 * d[1]).bfloat16()) + (0.003 * d[1]).bfloat16() == expected).double().mean()
    assert twice < 0.99  # Two casts would be seen.
