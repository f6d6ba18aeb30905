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

GEMMA = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
PARTS = {  # What is added after attention, what reads `resid_mid`, what is added after the MLP.
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": GEMMA,
    "olmo2": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "granitemoe": ("self_attn", "post_attention_layernorm", "block_sparse_moe"),
}


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
        linear = hasattr(layer, "linear_attn")
        attention = "linear_attn" if linear else "self_attn"
        added, before, after = PARTS.get(family, (attention, "post_attention_layernorm", "mlp"))
        assert place.layer is layer
        assert place.attention_output is (layer.linear_attn.out_proj if linear else layer.self_attn.o_proj)
        assert place.attention_added is getattr(layer, added) and place.mlp_added is getattr(layer, after)
        assert place.before_mlp is getattr(layer, before)
        assert place.mlp_output is getattr(getattr(layer, "mlp", None), "down_proj", None)


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
