"""The dispatcher itself: when torch hooks come and go, and that it minds nobody else's."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Custom, Direction, SteerError, Steering
from steer.positions import Positions

IDS = torch.tensor([[3, 14, 15]])


def hooks(hf):
    return {
        id(hook)
        for module in hf.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    }


def one(layer=1, site="resid_post"):
    return Steering((Add(Direction(torch.ones(1, 48), (layer,), site), site),))


def test_following_positions_does_not_install_the_layers_hooks_again(tiny):
    """Generation enters `at` for every token, so it must cost nothing per layer."""
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    with model.steered(one()):
        before = hooks(hf)
        with model.at(Positions(model.marks, [2])):
            assert hooks(hf) == before
            hf(input_ids=IDS)
        assert hooks(hf) == before
    with model.at(Positions(model.marks, [2])):
        assert len(hooks(hf)) == 1
    assert not hooks(hf)


def test_only_places_in_use_have_hooks(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    for steering, count in ((one(), 2), (one(site="attn_raw"), 2), (one(site="resid_mid"), 2)):
        with model.steered(steering), model.steered(steering):
            assert len(hooks(hf)) == count  # One on the backbone, one on the place.
            hf(input_ids=IDS)
    with model.steered(Steering((Custom(lambda h, layer: h, "resid_mid", (1,)),))):
        assert len(hooks(hf)) == 3  # A function of the stream also needs the layer's input.
        hf(input_ids=IDS)


def test_other_peoples_hooks_stay_and_still_run(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    seen = []
    handle = hf.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    theirs = hooks(hf)
    with model.steered(one()):
        hf(input_ids=IDS)
    assert len(seen) == 1 and hooks(hf) == theirs
    handle.remove()


def test_nested_positions_the_innermost_counts(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    seen = []
    reading = model.read(lambda site, layer, value, states: seen.append(states.tolist()), {"resid_post": [0]})
    with torch.no_grad(), reading, model.at(Positions(model.marks, [3])):
        with model.at(Positions(model.marks, [1])):
            hf(input_ids=IDS, use_cache=False)
        hf(input_ids=IDS, use_cache=False)
    assert seen == [[[1, 1, 1]], [[0, 0, 1]]]


def test_a_refused_context_leaves_those_around_it_in_force(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    with model.steered(one()) as report:
        with pytest.raises(SteerError), model.capture({"z": [17]}):
            pass
        hf(input_ids=IDS)
    assert report.touched == {(1, "resid_post"): {"all": 3}} and not hooks(hf)


def test_embeddings_with_phases_are_refused(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    with pytest.raises(SteerError, match="embeddings instead of token ids"), model.at(Positions(model.marks, [2])):
        hf(inputs_embeds=hf.model.embed_tokens(IDS))
    assert not hooks(hf)
