"""Output biases: with the key that the record names and the biases that it lists, transformers loads a checkpoint whole."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from steer.anatomy import read_headers, resolve
from steer.anatomy.headers import SINGLE
from steer.anatomy.record import bundled, families
from steer.anatomy.slots import Matrix
from tests import conversions
from tests.tiny import FAMILIES, build

WORDS = ("attention_output", "mlp_output")
PLAIN = {"attention_bias": False, "mlp_bias": False}
GROWN = [(family, word) for family in families() for word in WORDS if word in bundled(family).output_bias]
FIXED = [(family, word) for family in families() for word in WORDS if word not in bundled(family).output_bias]


def plain(family):
    """Values that switch every bias off, of those that the family's configuration knows."""
    config = AutoConfig.for_model(family)
    return {key: value for key, value in PLAIN.items() if hasattr(config, key)}


@pytest.mark.parametrize(("family", "word"), GROWN)
def test_a_checkpoint_with_the_bias_is_loaded_whole(tmp_path, caplog, family, word):
    build(family, **plain(family)).model.save_pretrained(tmp_path)
    headers = read_headers(tmp_path)
    anatomy = resolve(headers.config, headers.shapes)
    found = anatomy.output_bias(word)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / SINGLE).items()}
    layers = [m.layer for m in anatomy.matrices(word) if word == "mlp_output" or m.layer not in anatomy.linear_layers]
    expected = {}
    for layer in layers:
        weight = anatomy.on_disk(Matrix(layer, word)).name
        assert not anatomy.has_bias(word, layer)
        begin = weight[: weight.index(f".{layer}.")] + f".{layer}."
        for path in found.companions:
            if f"{begin}{path}.weight" in tensors:
                tensors[f"{begin}{path}.bias"] = torch.zeros(tensors[f"{begin}{path}.weight"].shape[0])
        bias = tensors[weight.removesuffix("weight") + "bias"] = torch.randn(anatomy.hidden)
        expected[anatomy.in_memory(Matrix(layer, word, bias=True)).name] = bias
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**headers.config, found.key: True}))
    with caplog.at_level(logging.WARNING, "transformers"):
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = model.state_dict()
    assert layers and all(torch.equal(state[name], bias) for name, bias in expected.items())
    again = read_headers(tmp_path)
    assert all(resolve(again.config, again.shapes).has_bias(word, layer) for layer in layers)


@pytest.mark.parametrize(("family", "word"), FIXED)
def test_a_family_without_a_key_has_no_bias_whatever_the_configuration_says(family, word):
    settings = build(family).model.config.to_dict() | dict.fromkeys(plain(family), True)
    config = AutoConfig.for_model(family, **{key: value for key, value in settings.items() if key != "model_type"})
    inner = getattr(bundled(family).layer, word)
    assert not [name for name, _ in conversions.empty(config).named_parameters() if name.endswith(f"{inner}.bias")]


def test_every_family_is_asked():
    assert {family for family, _ in GROWN + FIXED} == set(FAMILIES)
