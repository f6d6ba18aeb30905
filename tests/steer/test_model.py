"""`wrap`, views, `run` and the parts that other rooms ask a model for."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Custom, Direction, Patch, ProjectOut, SteerError, Steering
from steer.identity import UNKNOWN, tokenizer_id
from steer.operations import ProjectColumns
from tests.tiny import FAMILIES

SEQUENCES = [[3, 14, 15, 9, 26], [8, 9, 7], [4, 4, 30, 31]]


def steering(site="resid_post", coefficient=1.0, seed=0, name=""):
    d = Direction(torch.randn(2, 48, generator=torch.Generator().manual_seed(seed)), (1, 2), site)
    return Steering((Add(d, site, coefficient),), name=name)


def patch(seed=0):
    vector = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    return Patch((ProjectColumns(1, "attention_output", (0, 2), vector),))


def same(found, expected, tolerance=0.0):
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_gives_each_sequence_its_own_logits(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    logits, hidden = model.run(SEQUENCES), model.run(SEQUENCES, head=False)
    for sequence, found, state in zip(SEQUENCES, logits, hidden, strict=True):
        with torch.no_grad():
            expected = hf(input_ids=torch.tensor([sequence]), use_cache=False, output_hidden_states=True)
        assert found.shape == (len(sequence), model.anatomy.vocab) and state.shape == (len(sequence), 48)
        torch.testing.assert_close(found, expected.logits[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(state, expected.hidden_states[-1][0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "out"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_run_returns_float32_or_wider(tiny, dtype, out):
    hf, tokenizer = tiny("llama", dtype=dtype)
    model = steer.wrap(hf, tokenizer)
    assert model.run(SEQUENCES)[0].dtype == out and model.dtype == dtype
    assert not model.run(SEQUENCES)[0].requires_grad


@pytest.mark.parametrize("sequences", [[], [[]], [[3], []]])
def test_run_refuses_nothing(tiny, sequences):
    with pytest.raises(SteerError, match="nothing to run"):
        steer.wrap(*tiny("llama")).run(sequences)


def test_identity_and_names(tiny):
    hf, tokenizer = tiny("qwen3")
    model = steer.wrap(hf, tokenizer, name="mine")
    assert model.identity.family == "qwen3" and model.identity.name == model.name == "mine"
    assert model.identity.tokenizer_id == tokenizer_id(tokenizer) and model.identity.weights_id == UNKNOWN
    assert steer.wrap(hf, None).identity.tokenizer_id == UNKNOWN
    other, _ = tiny("qwen3", head_dim=20)
    assert steer.wrap(other, None).identity.shape_id != model.identity.shape_id
    again, _ = tiny("qwen3", seed=5)
    assert steer.wrap(again, None).identity.shape_id == model.identity.shape_id
    assert "mine" in repr(model) and "4 layers x 4 heads" in repr(model)
    assert model.path is None and model.card is None and model.device == torch.device("cpu")


def test_marks_come_from_the_tokenizer_or_the_caller(tiny):
    hf, tokenizer = tiny("llama")
    assert steer.wrap(hf, tokenizer).marks.opening == ((5,),)
    from steer.phases import Marks

    mine = Marks(((9,),), ((10, 11),))
    assert steer.wrap(hf, tokenizer, marks=mine).marks == mine and not steer.wrap(hf).marks.exist


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_models_own(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    for layer in range(4):
        module = hf.model.layers[layer]
        own = module.self_attn.o_proj if hasattr(module, "self_attn") else module.linear_attn.out_proj
        assert model.parameter("attention_output", layer) is own.weight and model.out_projection(layer) is own
        if layer in model.anatomy.dense_mlp_layers:
            assert model.parameter("mlp_output", layer) is hf.model.layers[layer].mlp.down_proj.weight
        else:
            with pytest.raises(SteerError, match="experts"):
                model.parameter("mlp_output", layer)
    assert model.backbone is hf.model and model.lm_head is hf.lm_head
    for module, layer in (("attention_output", 4), ("query", 0), ("embedding", 0)):
        with pytest.raises(SteerError):
            model.parameter(module, layer)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_view_runs_under_its_changes_and_the_model_does_not(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    plain = model.run(SEQUENCES)
    view = model.with_(steering(), coefficient=0.5)
    with model.steered(steering(), 0.5):
        expected = model.run(SEQUENCES)
    same(view.run(SEQUENCES), expected)
    same(model.run(SEQUENCES), plain)
    assert view.hf is hf and (view.run(SEQUENCES)[0] - plain[0]).abs().max() > 1e-2
    both = view.with_(steering(seed=3))
    together = both.run(SEQUENCES)
    with model.steered(steering(), 0.5), model.steered(steering(seed=3)):
        same(together, model.run(SEQUENCES))
    assert len(both.changes) == 2 and len(view.changes) == 1 and not model.changes


def test_views_nest_and_count_once_inside_themselves(tiny):
    model = steer.wrap(*tiny("llama"))
    one, two = model.with_(steering()), model.with_(steering(seed=3))
    alone = one.run(SEQUENCES)
    with one.active() as reports:
        same(one.run(SEQUENCES), alone)  # Entered again inside itself it does nothing more.
        same(model.run(SEQUENCES), alone)  # The weights and hooks are shared.
        with one.active() as again:
            assert again == ()
        inside = two.run(SEQUENCES)
    assert reports[0].touched[1, "resid_post"] == {"all": 3 * 12}
    same(inside, one.with_(steering(seed=3)).run(SEQUENCES))
    with pytest.raises(RuntimeError), one.active():
        raise RuntimeError
    same(one.run(SEQUENCES), alone)


def test_a_view_over_a_patch_is_the_patched_model(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    before = model.parameter("attention_output", 1).clone()
    view = model.with_(patch(), coefficient=0.5).with_(steering())
    with patch().on(model, 0.5), model.steered(steering()):
        expected = model.run(SEQUENCES)
    same(view.run(SEQUENCES), expected)
    assert torch.equal(model.parameter("attention_output", 1), before)
    hook = model.with_(patch().steering(), coefficient=0.5).with_(steering())
    same(hook.run(SEQUENCES), expected, 1e-5)


def test_change_ids_tell_changes_apart(tiny):
    model = steer.wrap(*tiny("llama"))
    ids = [
        model.with_(*changes, coefficient=c).change_ids
        for changes, c in (
            ((), 1.0),
            ((steering(),), 1.0),
            ((steering(),), 0.5),
            ((steering(seed=1),), 1.0),
            ((patch(),), 1.0),
        )
    ]
    assert ids[0] == () and len(set(ids)) == len(ids)
    assert model.with_(steering(), patch()).change_ids == ids[1] + ids[4]
    assert model.with_(steering(name="other")).change_ids == ids[1]


def test_what_does_not_fit_is_refused(tiny):
    model = steer.wrap(*tiny("llama"))
    with pytest.raises(SteerError, match="Steering or a Patch"):
        model.with_(steering().interventions[0])
    wide = Direction(torch.ones(1, 64), (1,), "resid_post")
    deep = Direction(torch.ones(1, 48), (9,), "resid_post")
    foreign, _ = tiny("qwen3")
    other = Direction(torch.ones(1, 48), (1,), "resid_post", model=steer.wrap(foreign).identity)
    for direction in (wide, deep, other):
        with pytest.raises(SteerError), model.steered(Steering((Add(direction, "resid_post"),))):
            pass
    with pytest.raises(SteerError, match="layer 9"), model.steered(Steering((Add(deep, "resid_post"),))):
        pass
    heads = Steering((ProjectOut(Direction(torch.ones(1, 48), (1,), "resid_mid"), "head_out", heads=((1, 4),)),))
    with pytest.raises(SteerError, match="head 4"), model.steered(heads):
        pass
    with pytest.raises(SteerError, match="nan"), model.steered(steering(), float("nan")):
        pass


def test_rendering_needs_a_tokenizer(tiny):
    hf, tokenizer = tiny("llama")
    rendered = steer.wrap(hf, tokenizer).render([{"role": "user", "content": "hello"}])
    assert rendered.token_ids[rendered.generation_prompt_start :] == tuple(
        tokenizer("<|im_start|> assistant")["input_ids"]
    )
    with pytest.raises(SteerError, match="no tokenizer"):
        steer.wrap(hf).render("hello")


def test_generate_is_steered_by_views_and_contexts(tiny):
    model = steer.wrap(*tiny("qwen3"))
    sampling = steer.Sampling(temperature=0.0, max_new_tokens=6)
    strong = steering(coefficient=30.0)

    def ids(traces):
        return [trace.completion_token_ids for trace in traces]

    plain = model.generate(["hello why", "think"], sampling=sampling)
    with model.steered(strong):
        inside = model.generate(["hello why", "think"], sampling=sampling)
    assert ids(inside) == ids(model.with_(strong).generate(["hello why", "think"], sampling=sampling)) != ids(plain)


def test_a_view_of_a_view_enters_only_what_is_not_in_force_yet(tiny):
    model = steer.wrap(*tiny("llama"))
    view = model.with_(steering())
    child = view.with_(steering(seed=3))
    expected = child.run(SEQUENCES)
    with view.active():
        same(child.run(SEQUENCES), expected)
        same(view.with_(steering(seed=3)).run(SEQUENCES), expected)
        same(model.with_(steering()).run(SEQUENCES), view.with_(steering()).run(SEQUENCES))
    with view.steered(steering(seed=3)):
        same(model.run(SEQUENCES), expected)  # The view's own change first, then the context's.


def test_what_a_view_captures_is_under_its_changes(tiny):
    model = steer.wrap(*tiny("llama"))
    view = model.with_(steering())
    ids = torch.tensor([SEQUENCES[0]])
    with view.capture({"resid_post": [3]}) as seen:
        model.hf(ids)
    with model.steered(steering()), model.capture({"resid_post": [3]}) as expected:
        model.hf(ids)
    with model.capture({"resid_post": [3]}) as plain:
        model.hf(ids)
    assert torch.equal(seen["resid_post"][3], expected["resid_post"][3])
    assert not torch.equal(seen["resid_post"][3], plain["resid_post"][3])


def test_results_say_under_which_open_contexts_they_came_about(tiny):
    model = steer.wrap(*tiny("qwen3"))
    sampling = steer.Sampling(temperature=0.0, max_new_tokens=2)
    with model.steered(steering(), 0.5), patch().on(model):
        inside = model.generate(["hello"], sampling=sampling).meta["changes"]
    expected = list(model.with_(steering(), coefficient=0.5).with_(patch()).change_ids)
    assert inside == expected and len(expected) == 2
    assert model.generate(["hello"], sampling=sampling).meta["changes"] == [] == list(model.in_force)
    custom = Steering((Custom(lambda h, layer: h * 0, "resid_post", (1,)),))
    with model.steered(custom):
        assert model.generate(["hello"], sampling=sampling).meta["changes"] == ["unknown"]


def test_a_patch_cannot_come_after_a_hook_that_edits_the_same_head(tiny):
    model = steer.wrap(*tiny("qwen3"))
    hook = patch().steering()
    with pytest.raises(SteerError, match="Enter the patch first"):
        model.with_(hook, patch()).run(SEQUENCES)
    with pytest.raises(SteerError, match="Enter the patch first"), model.steered(hook), patch().on(model):
        pass
    model.with_(patch(), hook).run(SEQUENCES)
    with model.steered(hook, 0.0), patch().on(model):
        pass
    assert not model.taps.entered and not model.taps.viewed
