"""Writes to routers against a naive rewrite of every family's block, against scaled weights, and against themselves."""

from __future__ import annotations

import warnings

import pytest
import torch

import steer
from steer import BiasRouter, ScaleExperts, SteerError, Steering
from steer.phases import State, states_of
from steer.positions import Positions
from tests.steer import naive_moe
from tests.steer.naive_moe import FAMILIES, Change

IDS = [[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3]]
SEQUENCE = [3, 14, 15, 9, 5, 20, 21, 22, 6, 30, 31]  # <think> is 5, </think> is 6.
PROMPT = 4
SIX = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")


def model_of(tiny, family, dtype=torch.float32, **overrides):
    """A model whose experts are computed one by one, on parameters of one alignment."""
    hf, tokenizer = tiny(family, dtype=dtype, **overrides)
    hf.set_experts_implementation("eager")
    for parameter in hf.parameters():
        parameter.data = parameter.data.clone()
    return steer.wrap(hf, tokenizer)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor(ids), use_cache=False).logits


def steered(model, *interventions, c=1.0, ids=IDS):
    with model.steered(Steering(interventions), coefficient=c):
        return logits(model, ids)


def routing(model, layer, *interventions, c=1.0, ids=IDS):
    """(ids, weights) of one layer."""
    with model.steered(Steering(interventions), coefficient=c), model.capture({"router": [layer]}) as acts:
        logits(model, ids)
    return acts["router"][layer].ids, acts["router"][layer].weights


def nothing(layer=1):
    return ScaleExperts(((layer, 0),), 1.0)


def naive(model, changes, ids=IDS):
    with naive_moe.rewritten(model.hf, changes):
        return logits(model, ids)


def named(model, *experts):
    """Pairs of these experts in the first and in the last layer with experts."""
    first, last = model.anatomy.expert_layers[0], model.anatomy.expert_layers[-1]
    return tuple((layer, expert) for layer in (first, last) for expert in experts)


def near(found, expected, plain, tolerance=1e-5):
    assert (expected - plain).abs().max() > 1e-3, "the change does something"
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ScaleExperts.


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_experts_equal_the_definition(tiny, family):
    model = model_of(tiny, family, torch.float64)
    plain = logits(model)
    for beta, renormalise in ((3.0, False), (0.0, False), (7.5, True)):
        pairs = named(model, 0, 2)
        change = Change(factors={0: 1 + 0.5 * (beta - 1), 2: 1 + 0.5 * (beta - 1)}, renormalise=renormalise)
        found = steered(model, ScaleExperts(pairs, beta, renormalise), c=0.5)
        near(found, naive(model, dict.fromkeys({layer for layer, _ in pairs}, change)), plain)
    removed = Change(factors={1: 0.0})  # The rewrite leaves such an expert out of its loop.
    pairs = named(model, 1)
    near(steered(model, ScaleExperts(pairs, 0.0)), naive(model, {layer: removed for layer, _ in pairs}), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_power_of_two_is_a_scaled_down_projection_to_the_bit(tiny, family, dtype):
    model = model_of(tiny, family, dtype)
    plain = logits(model)
    for beta in (64.0, 0.5, 0.0):
        pairs = named(model, 1, 3)
        hooked = steered(model, ScaleExperts(pairs, beta))
        kept = {}
        for layer, expert in pairs:
            experts = naive_moe.block_of(model.hf.model.layers[layer]).experts
            for name in ("down_proj", "down_proj_bias"):
                if hasattr(experts, name):
                    part = getattr(experts, name).data
                    kept[layer, expert, name] = part[expert].clone()
                    part[expert] *= beta
        edited = logits(model)
        for (layer, expert, name), part in kept.items():
            getattr(naive_moe.block_of(model.hf.model.layers[layer]).experts, name).data[expert] = part
        assert torch.equal(hooked, edited)
        assert not torch.equal(hooked, plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", SIX)
def test_a_factor_of_one_changes_no_bit_and_installs_nothing(tiny, family):
    model = model_of(tiny, family, torch.bfloat16)
    plain = logits(model)
    every = tuple((layer, expert) for layer in model.anatomy.expert_layers for expert in range(4))
    for beta, c in ((1.0, 1.0), (1.0, -3.0), (64.0, 0.0)):
        for renormalise in (False, True):
            with model.steered(Steering((ScaleExperts(every, beta, renormalise),)), coefficient=c) as report:
                assert not any(
                    model.places.layers[layer].router._forward_hooks for layer in model.anatomy.expert_layers
                )
                assert torch.equal(logits(model), plain)
            assert "zero" in report.idle


@pytest.mark.parametrize("family", SIX)
def test_the_choice_of_the_scaled_layer_stays_and_renormalised_rows_keep_their_sum(tiny, family):
    model = model_of(tiny, family)
    for layer in model.anatomy.expert_layers[:2]:
        ids, weights = routing(model, layer, nothing(layer))
        (expert, *_) = [e for e in range(4) if (ids == e).any() and not (ids == e).any(-1).all()]
        for renormalise in (False, True):
            found_ids, found = routing(model, layer, ScaleExperts(((layer, expert),), 5.0, renormalise))
            assert torch.equal(found_ids, ids)
            touched = (ids == expert).any(-1)
            assert torch.equal(found[~touched], weights[~touched]), "to the bit"
            if renormalise:
                torch.testing.assert_close(found.sum(-1), weights.sum(-1))
                assert not torch.equal(found, weights)
            else:
                factors = torch.where(ids == expert, 5.0, 1.0)
                assert torch.equal(found, weights * factors)
    sums = routing(model, layer, nothing(layer))[1].sum(-1)
    if family == "deepseek_v3":
        torch.testing.assert_close(sums, torch.full_like(sums, 2.5))
    if family == "olmoe":
        assert (sums < 1).all()


@pytest.mark.parametrize("family", SIX)
def test_tokens_before_the_first_that_chose_the_expert_stay_to_the_bit(tiny, family):
    model = model_of(tiny, family)
    layer = model.anatomy.expert_layers[-1]
    ids, _ = routing(model, layer, nothing(layer))
    later = 0
    for expert in range(4):
        plain, found = logits(model), steered(model, ScaleExperts(((layer, expert),), 8.0))
        for row in range(len(IDS)):
            places = (ids[row] == expert).any(-1).nonzero().flatten().tolist()
            first = places[0] if places else len(IDS[row])
            later += 0 < first < len(IDS[row])
            assert torch.equal(found[row, :first], plain[row, :first])
            assert first == len(IDS[row]) or not torch.equal(found[row, first], plain[row, first])
    assert later, "some expert is first chosen later than by the first token"


def test_several_scalings_act_in_order_and_add_up_over_contexts(tiny):
    model = model_of(tiny, "olmoe", torch.float64)
    first, second, third = (
        ScaleExperts(((0, 0), (0, 1)), 4.0),
        ScaleExperts(((0, 1), (0, 2)), 3.0, renormalise=True),
        ScaleExperts(((0, 2),), 0.25),
    )
    ids, weights = routing(model, 0, nothing(0))
    expected = weights.double() * torch.tensor([4.0, 4.0, 1.0, 1.0])[ids]
    after = expected * torch.tensor([1.0, 3.0, 3.0, 1.0])[ids]
    expected = after * (expected.sum(-1) / after.sum(-1))[..., None] * torch.tensor([1.0, 1.0, 0.25, 1.0])[ids]
    torch.testing.assert_close(routing(model, 0, first, second, third)[1].double(), expected)
    with model.steered(Steering((first,))), model.steered(Steering((second, third))):
        torch.testing.assert_close(routing(model, 0, nothing(0))[1].double(), expected)
    assert torch.equal(routing(model, 0, first, third)[1], routing(model, 0, third, first)[1])


def test_nothing_left_to_renormalise_is_refused_but_not_for_padding(tiny):
    model = model_of(tiny, "qwen3_moe")
    ids, _ = routing(model, 1, nothing())
    chosen = tuple((1, expert) for expert in sorted(set(ids[0, 3].tolist())))
    with pytest.raises(SteerError, match=r"All experts that \d+ tokens chose in layer 1 are taken out"):
        steered(model, ScaleExperts(chosen, 0.0, renormalise=True))
    assert steered(model, ScaleExperts(chosen, 0.0)).isfinite().all()
    assert steered(model, ScaleExperts(chosen[:1], 0.0, renormalise=True)).isfinite().all()
    with pytest.raises(SteerError, match="taken out"):  # One taken out before, one now.
        steered(model, ScaleExperts(chosen[:1], 0.0), ScaleExperts(chosen[1:], 0.0, renormalise=True))
    with pytest.raises(SteerError, match="multiplies weights by -1"):
        steered(model, ScaleExperts(chosen, 0.0), c=2.0)

    alone = [IDS[0][:3]]  # A row that goes elsewhere, padded by tokens that may not.
    others = routing(model, 1, nothing(), ids=alone)[0]
    free = {tuple(sorted(pair)) for pair in others.reshape(-1, 2).tolist()}
    gone = next(pair for pair in ((a, b) for a in range(4) for b in range(a)) if tuple(sorted(pair)) not in free)
    scale = ScaleExperts(tuple((1, expert) for expert in gone), 0.0, renormalise=True)
    padded = torch.tensor([[0] * 9 + alone[0]])
    with model.steered(Steering((scale,))), torch.no_grad():
        found = model.hf(input_ids=padded, attention_mask=(padded != 0).long(), use_cache=False).logits
    torch.testing.assert_close(found[:, -3:], steered(model, scale, ids=alone), rtol=1e-5, atol=1e-5)


# BiasRouter.


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_logits_equal_the_definition(tiny, family):
    model = model_of(tiny, family, torch.float64)
    plain = logits(model)
    layers = (model.anatomy.expert_layers[0], model.anatomy.expert_layers[-1])
    cases = (
        Change(bias={0: 1.5, 3: -0.7}),
        Change(force_in=(2,)),
        Change(force_out=(1,)),
        Change(bias={1: 0.8}, force_in=(3,), force_out=(0,)),
    )
    for change in cases:
        bias = BiasRouter(
            tuple((layer, expert, number) for layer in layers for expert, number in change.bias.items()),
            tuple((layer, expert) for layer in layers for expert in change.force_in),
            tuple((layer, expert) for layer in layers for expert in change.force_out),
        )
        near(steered(model, bias), naive(model, dict.fromkeys(layers, change)), plain)
        for layer in layers:
            ids, _ = routing(model, layer, bias)
            for expert in change.force_in:
                assert (ids == expert).any(-1).all()
            for expert in change.force_out:
                assert not (ids == expert).any()


@pytest.mark.parametrize("family", SIX)
def test_an_added_bias_is_a_shift_of_the_routers_input(tiny, family):
    """The least-squares shift x with W x = b, on the router's input: transformers' own code makes the choice."""
    model = model_of(tiny, family)
    layer = model.anatomy.expert_layers[0]
    router = model.places.layers[layer].router
    added = torch.tensor([0.9, -0.4, 0.0, 1.3])
    shift = torch.linalg.lstsq(router.weight.detach().double(), added.double()[:, None]).solution[:, 0].float()
    handle = router.register_forward_pre_hook(lambda module, args: (args[0] + shift,))
    expected = logits(model)
    handle.remove()
    bias = BiasRouter(tuple((layer, expert, float(number)) for expert, number in enumerate(added) if number))
    near(steered(model, bias), expected, logits(model), 5e-5)  # The shift is float32 too.


@pytest.mark.parametrize("groups", [(4, 2, 3), (4, 1, 2), (2, 1, 4), (2, 2, 3)])
@pytest.mark.parametrize("family", naive_moe.SIGMOID)
def test_forcing_holds_within_groups_whatever_the_selection_bias(tiny, family, groups):
    """Eight experts in groups, under a selection bias that is larger than any score."""
    number, best, top = groups
    model = model_of(
        tiny, family, torch.float64,
        n_routed_experts=8, n_group=number, topk_group=best, num_experts_per_tok=top, norm_topk_prob=True,
    )  # fmt: skip
    random = torch.Generator().manual_seed(number * 10 + best)
    for layer in model.anatomy.expert_layers:
        model.places.layers[layer].router.e_score_correction_bias.copy_(3 * torch.randn(8, generator=random))
    before = {layer: model.places.layers[layer].router.e_score_correction_bias.clone() for layer in (1, 3)}
    plain, size = logits(model), 8 // number
    for change in (
        Change(force_in=(5,)),
        Change(force_out=(0, 6)),
        Change(force_in=(4,), force_out=tuple(range(5, 4 + size))),  # Alone in its group.
        Change(force_in=(6, 7), bias={0: 2.0}),
    ):
        left = [sum(e not in change.force_out for e in range(g * size, (g + 1) * size)) for g in range(number)]
        home = {e // size for e in change.force_in}
        room = sum(left[g] for g in home) + sum(
            sorted((n for g, n in enumerate(left) if g not in home), reverse=True)[: best - len(home)]
        )
        if room < top:
            continue
        bias = BiasRouter(
            tuple((layer, e, b) for layer in (1, 3) for e, b in change.bias.items()),
            tuple((layer, e) for layer in (1, 3) for e in change.force_in),
            tuple((layer, e) for layer in (1, 3) for e in change.force_out),
        )
        near(steered(model, bias), naive(model, dict.fromkeys((1, 3), change)), plain)
    assert all(torch.equal(model.places.layers[at].router.e_score_correction_bias, kept) for at, kept in before.items())
    assert torch.equal(logits(model), plain)


def test_bfloat16_does_not_swallow_the_margin(tiny):
    """SteerMoE writes max + 0.01 in the model's dtype, where it is lost beside log-probabilities below -4."""
    size = {"num_experts": 128, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    model = model_of(tiny, "qwen3_moe", torch.bfloat16, **size)
    model.places.layers[1].router.weight.data *= 0.1
    forced = 127
    with model.capture({"router_logits": [1]}) as acts:
        logits(model)
    z = acts["router_logits"][1]
    theirs = torch.log_softmax(z, dim=-1)
    theirs[..., forced] = theirs.amax(-1) + 0.01
    others = theirs[..., :forced].amax(-1)
    assert z.dtype == theirs.dtype == torch.bfloat16 and (theirs[..., forced] == others).any(), "lost"
    assert (theirs.float().softmax(-1).topk(1).indices[..., 0] != forced).any(), "so it is not chosen"
    bias = BiasRouter(force_in=((1, forced),))
    with model.steered(Steering((bias,))), model.capture({"router_logits": [1], "router": [1]}) as acts:
        logits(model)
    ours = acts["router_logits"][1]
    assert ours.dtype == torch.float32 and (ours[..., forced] > ours[..., :forced].amax(-1)).all()
    assert (acts["router"][1].ids == forced).all()


def test_what_was_forced_and_did_not_hold_is_an_error_at_the_end(tiny):
    model = model_of(tiny, "deepseek_v3")
    contrary = (BiasRouter(force_in=((1, 2),)), BiasRouter(force_out=((1, 2),)))
    with pytest.raises(SteerError, match="Expert 2 of layer 1 was forced in, and 14 tokens did not choose it"):
        steered(model, *contrary)
    with pytest.raises(SteerError, match="Expert 2 of layer 1 was forced out, and 14 tokens chose it"):
        steered(model, *reversed(contrary))
    padded = torch.tensor([[0, 0, 3, 14]])
    with (
        pytest.raises(SteerError, match="and 2 tokens did not"),
        model.steered(Steering(contrary)),
        torch.no_grad(),
    ):
        model.hf(input_ids=padded, attention_mask=(padded != 0).long(), use_cache=False)
    with pytest.raises(SteerError, match="coefficient 1"):
        steered(model, contrary[0], c=0.5)


# Both, phases and padding.


def where(phase):
    wanted = {"all": set(State), "generated": {State.OPENING, State.THINKING, State.ANSWER}}
    states = states_of(SEQUENCE, PROMPT, steer.marks.Marks(((5,),), ((6,),)))
    return [state in wanted.get(phase, {State[phase.upper()]} if phase not in wanted else set()) for state in states]


@pytest.mark.parametrize("phase", ["prompt", "thinking", "answer", "generated", "all"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_phase_changes_its_own_tokens_only(tiny, family, phase):
    model = model_of(tiny, family, torch.float64)
    layer = model.anatomy.expert_layers[0]
    acts = where(phase)
    change = Change({1: 0.5}, (3,), (0,), {3: 2.5, 2: 2.5}, True, lambda place: acts[place])
    steering = Steering(
        (
            BiasRouter(((layer, 1, 0.5),), ((layer, 3),), ((layer, 0),), phase),
            ScaleExperts(((layer, 2), (layer, 3)), 2.5, True, phase),
        )
    )
    plain_ids, plain = whole(model, layer)
    with model.steered(steering) as report, model.capture({"router": [layer]}) as seen:
        found = model.run([SEQUENCE], [PROMPT])[0]
    with naive_moe.rewritten(model.hf, {layer: change}):
        torch.testing.assert_close(found, model.run([SEQUENCE], [PROMPT])[0], rtol=1e-5, atol=1e-5)
    outside = ~torch.tensor(acts)
    assert torch.equal(seen["router"][layer].ids[0, outside], plain_ids[0, outside])
    assert torch.equal(seen["router"][layer].weights[0, outside], plain[0, outside])
    count = {phase: sum(acts)}
    assert report.touched == {(layer, "router"): count, (layer, "router_logits"): count}


def whole(model, layer):
    with model.capture({"router": [layer]}) as acts:
        model.run([SEQUENCE], [PROMPT])
    return acts["router"][layer].ids, acts["router"][layer].weights


def test_two_phases_at_one_router(tiny):
    model = model_of(tiny, "deepseek_v3", torch.float64)
    both = Steering(
        (
            BiasRouter(force_in=((1, 3),), phase="thinking"),
            BiasRouter(((1, 2, 4.0),), force_out=((1, 0),), phase="answer"),
            ScaleExperts(((1, 1),), 0.0, phase="prompt"),
        )
    )
    with model.steered(both), model.capture({"router": [1]}) as acts:
        model.run([SEQUENCE], [PROMPT])
    found = acts["router"][1]
    for phase, change in (
        ("thinking", Change(force_in=(3,))),
        ("answer", Change({2: 4.0}, force_out=(0,))),
        ("prompt", Change(factors={1: 0.0})),
    ):
        inside, seen = torch.tensor(where(phase)), {}
        with naive_moe.rewritten(model.hf, {1: change}, seen):
            model.run([SEQUENCE], [PROMPT])
        for place in inside.nonzero().flatten().tolist():
            ids, weights = seen[1][place]
            expected = dict(zip(ids, weights, strict=True))
            got = dict(zip(found.ids[0, place].tolist(), found.weights[0, place].tolist(), strict=True))
            assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "qwen3_next"])
def test_generation_with_a_cache_routes_as_one_full_pass(tiny, family):
    model = model_of(tiny, family)
    layer = model.anatomy.expert_layers[0]
    steering = Steering(
        (
            BiasRouter(((layer, 1, 1.0),), force_in=((layer, 2),), phase="generated"),
            ScaleExperts(((layer, 2),), 4.0, phase="generated"),
            ScaleExperts(((layer, 0),), 3.0, renormalise=True, phase="prompt"),
        )
    )
    view = model.with_(steering)
    with view.capture({"router": [layer], "router_logits": [layer]}, every=True) as acts:
        (trace,) = view.generate([steer.RawText("0 1 2 3")], sampling=steer.Sampling(temperature=0.0, max_new_tokens=8))
    steps = [(each["router"][layer], each["router_logits"][layer]) for each in acts.forwards]
    assert len(steps) > 2
    tokens = list(trace.tokens)
    with view.capture({"router": [layer], "router_logits": [layer]}) as acts:
        view.run([tokens], [trace.prompt_length])
    width = sum(step.ids.shape[1] for step, _ in steps)
    full, z = acts["router"][layer], acts["router_logits"][layer]
    assert width in (len(tokens) - 1, len(tokens))
    assert torch.equal(torch.cat([step.ids for step, _ in steps], 1), full.ids[:, :width])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([step.weights for step, _ in steps], 1), full.weights[:, :width], **close)
    torch.testing.assert_close(torch.cat([logits for _, logits in steps], 1), z[:, :width], **close)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_padded_rows_equal_single_rows(tiny, family):
    model = model_of(tiny, family)
    layer = model.anatomy.expert_layers[0]
    steering = Steering(
        (BiasRouter(((layer, 1, 1.0),), force_in=((layer, 2),)), ScaleExperts(((layer, 2),), 3.0, True, "thinking"))
    )
    rows, prompts = [SEQUENCE, SEQUENCE[2:], SEQUENCE[:7]], [4, 2, 4]
    width = len(SEQUENCE)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    positions = Positions(model.marks, prompts)
    with model.steered(steering) as report, model.at(positions), torch.no_grad():
        together = model.hf(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits
    assert report.touched[layer, "router_logits"] == {"all": sum(map(len, rows))}
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        with model.steered(steering):
            alone = model.run([tokens], [prompt])[0]
        torch.testing.assert_close(together[row, width - len(tokens) :], alone, rtol=1e-4, atol=1e-4)


# Reading, and what stands around.


def test_readers_and_listeners_see_what_comes_after_every_write(tiny):
    model = model_of(tiny, "qwen3_moe")
    heard, seen = [], []
    forcing = Steering((BiasRouter(force_in=((1, 3),)), ScaleExperts(((1, 3),), 2.0)))
    with (
        model.hear(lambda layer, routing, states: heard.append((layer, routing, states)), [1]),
        model.read(lambda site, layer, value, states: seen.append((site, layer, value)), {"router_logits": None}),
        model.steered(forcing),
    ):
        model.run([SEQUENCE], [PROMPT])
    ((layer, found, states),) = heard
    assert layer == 1 and states.shape == (1, len(SEQUENCE))
    assert found.ids.shape == found.weights.shape == (1, len(SEQUENCE), 2)
    assert (found.ids == 3).any(-1).all() and (found.weights[found.ids == 3] > 1).all()
    assert [(site, layer) for site, layer, _ in seen] == [("router_logits", 1), ("router_logits", 3)]
    z = seen[0][2]
    assert z.shape == (1, len(SEQUENCE), 4)
    assert (z[..., 3] - z[..., :3].amax(-1) >= 0.01 - 1e-5).all()


def test_logits_are_written_before_weights_whichever_context_came_first(tiny):
    model = model_of(tiny, "mixtral")
    scale, bias = ScaleExperts(((0, 2),), 4.0), BiasRouter(force_in=((0, 2),))
    expected = routing(model, 0, bias, scale)
    assert (expected[1] > 1).any(-1).all(), "every token's forced expert is scaled"
    with model.steered(Steering((scale,))), model.steered(Steering((bias,))):
        found = routing(model, 0, nothing(0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reading_a_router_changes_nothing_and_needs_no_positions(tiny):
    model = model_of(tiny, "granitemoe", torch.bfloat16)
    plain = logits(model)
    with model.capture({"router": None, "router_logits": None, "mlp_out": [0]}) as acts:
        assert torch.equal(logits(model), plain)
    assert sorted(acts["router"]) == sorted(acts["router_logits"]) == list(model.anatomy.expert_layers)
    best = acts["router_logits"][2].topk(2, dim=-1).indices
    assert torch.equal(best.sort().values, acts["router"][2].ids.sort().values)
    assert not any(module._forward_hooks for module in model.hf.modules())


def test_a_foreign_generate_is_steered_in_phase_all(tiny):
    model = model_of(tiny, "mixtral")
    ids = torch.tensor([[3, 14, 15]])
    forcing = Steering((BiasRouter(force_in=((0, 1),), force_out=((2, 3),)),))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.steered(forcing) as report, model.capture({"router": [0, 2]}, every=True) as acts:
            model.hf.generate(ids, **options)
    assert all((each["router"][0].ids == 1).any(-1).all() for each in acts.forwards)
    assert not any((each["router"][2].ids == 3).any() for each in acts.forwards)
    assert report.touched[0, "router_logits"]["all"] == sum(each["router"][0].ids.shape[1] for each in acts.forwards)


@pytest.mark.parametrize("site", ["router", "router_logits"])
def test_places_without_experts_are_refused(tiny, site):
    mixed, dense = model_of(tiny, "deepseek_v3"), steer.wrap(*tiny("llama"))
    for model, remedy in ((mixed, r"one of the layers \[1, 2, 3\]"), (dense, "mixture of experts")):
        with pytest.raises(SteerError, match=f"Layer 0 of this .* model has no experts.*{remedy}"):
            model.taps.check_place(site, 0)
        with pytest.raises(SteerError, match="has no experts"), model.capture({site: [0]}):
            pass
    with pytest.raises(SteerError, match="expert"), dense.hear(print):
        pass
    with pytest.raises(SteerError, match=r"(?i)layer 9"), mixed.hear(print, [9]):
        pass
    if site == "router":
        with pytest.raises(SteerError, match=r"m\.hear"), mixed.read(print, {site: [1]}):
            pass


def test_packed_rows_are_refused(tiny):
    model = model_of(tiny, "mixtral")
    block = model.hf.model.layers[0].mlp
    forward = type(block).forward
    block.forward = lambda hidden: torch.cat(
        [forward(block, hidden[:, :2].clone()), forward(block, hidden[:, 2:].clone())], 1
    )
    with pytest.raises(SteerError, match="saw 4 tokens in a pass over 2 x 7"), model.capture({"router": [0]}):
        logits(model)
