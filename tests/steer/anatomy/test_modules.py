"""Places of a loaded model, and weights that are not in memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import steer
from steer import SteerError
from steer.anatomy.modules import module_tree, places, plain_weight
from tests.tiny import FAMILIES

BEHIND = {"gemma2", "gemma3_text", "olmo2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_the_modules_of_the_family(tiny, family):
    hf, tokenizer = tiny(family)
    found = steer.wrap(hf, tokenizer).places
    assert (found.backbone, found.embedding, found.head) == (
        hf.model,
        hf.get_input_embeddings(),
        hf.get_output_embeddings(),
    )
    for place, layer in zip(found.layers, hf.model.layers, strict=True):
        assert place.layer is layer and place.attention_output is layer.self_attn.o_proj
        assert place.attention_added is (layer.post_attention_layernorm if family in BEHIND else layer.self_attn)
        assert place.mlp_added is (layer.post_feedforward_layernorm if family in BEHIND else layer.mlp)
        assert place.mlp_output is getattr(layer.mlp, "down_proj", None)
    before = {"olmo2": "mlp", "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}
    assert found.layers[0].before_mlp is getattr(hf.model.layers[0], before.get(family, "post_attention_layernorm"))


def test_another_number_of_layers_is_refused(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    hf.model.layers = hf.model.layers[:3]
    with pytest.raises(SteerError, match="holds 3 layers; expected 4"):
        places(hf, model.anatomy)


def test_the_tree_names_every_module_up_to_a_limit(tiny):
    hf, _ = tiny("llama")
    layer = hf.model.layers[0]
    assert module_tree(layer).count("(") == len(list(layer.modules())) - 1
    assert module_tree(hf, limit=3).endswith(f"and {len(list(hf.modules())) - 4} more")


def test_an_offloaded_weight_is_in_memory_inside_and_gone_after(tiny):
    hf, _ = tiny("llama")
    projection = hf.model.layers[1].self_attn.o_proj
    expected = projection.weight.detach().clone()
    cpu_offload(hf, execution_device=torch.device("cpu"))
    assert projection.weight.is_meta
    with plain_weight(projection, "it") as weight:
        assert torch.equal(weight, expected) and not weight.requires_grad
    assert projection.weight.is_meta


@pytest.mark.parametrize("weight", [torch.zeros(4, 8, dtype=torch.int8), torch.zeros(32, 1), torch.zeros(8, 4)])
def test_what_is_no_plain_matrix_is_refused_by_name(weight):
    projection = nn.Linear(8, 4)
    projection.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(SteerError, match=r"The weight of layer 7.*attn_raw"), plain_weight(projection, "layer 7"):
        pass
