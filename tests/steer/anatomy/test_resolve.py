"""Anatomies: headers and loaded models agree, numbers are counted, and what does not fit is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import steer
from steer import SteerError
from steer.anatomy import read_headers, read_record, resolve
from steer.anatomy.modules import places, shapes_of
from steer.anatomy.record import FAMILIES
from steer.anatomy.slots import Matrix
from steer.identity import shape_id
from steer.patches import Patch
from tests.tiny import FAMILIES as TINY


def of_folder(folder):
    headers = read_headers(folder)
    return headers, resolve(headers.config, headers.shapes)


@pytest.mark.parametrize("family", TINY)
def test_headers_and_memory_give_one_anatomy(tiny, tiny_folder, family):
    headers, on_disk = of_folder(tiny_folder(family))
    hf, tokenizer = tiny(family)
    in_memory = steer.wrap(hf, tokenizer).anatomy
    assert on_disk.numbers() == in_memory.numbers() and shape_id(on_disk.numbers()) == shape_id(in_memory.numbers())
    assert (on_disk.biases, on_disk.dense_mlp_layers, on_disk.tied) == (
        in_memory.biases,
        in_memory.dense_mlp_layers,
        in_memory.tied,
    )
    config = hf.config
    assert on_disk.tied == config.tie_word_embeddings == ("lm_head.weight" not in headers.tensors)
    attention = next(layer.self_attn for layer in hf.model.layers if hasattr(layer, "self_attn"))
    assert (
        on_disk.head_width == getattr(attention, "v_head_dim", getattr(attention, "head_dim", None))
        and on_disk.heads == config.num_attention_heads
    )
    assert on_disk.kv_heads == config.num_key_value_heads and on_disk.vocab == config.vocab_size


@pytest.mark.parametrize("family", TINY)
def test_disk_names_are_those_of_the_checkpoint(tiny, tiny_folder, family):
    headers, anatomy = of_folder(tiny_folder(family))
    hf, _ = tiny(family)
    found = places(hf, anatomy)
    memory = {id(parameter): name for name, parameter in hf.named_parameters()}
    for layer in range(anatomy.layers):
        for module in ("attention_output", "mlp_output"):
            if module == "mlp_output" and layer not in anatomy.dense_mlp_layers:
                continue
            projection = getattr(found.layers[layer], module)
            name = anatomy.disk_name(module, layer)
            assert name == memory[id(projection.weight)] and headers.tensors[name].shape == tuple(
                projection.weight.shape
            )
            assert anatomy.shape(module, layer) == tuple(projection.weight.shape)
            assert (
                anatomy.has_bias(module, layer)
                == (projection.bias is not None)
                == (name.removesuffix("weight") + "bias" in headers.tensors)
            )
    assert anatomy.disk_name("embedding") == "model.embed_tokens.weight"
    assert anatomy.disk_name("head") == ("model.embed_tokens.weight" if anatomy.tied else "lm_head.weight")


def test_head_width_is_counted_never_divided(tiny_folder):
    _, anatomy = of_folder(tiny_folder("qwen3"))
    assert anatomy.head_width == 16 != anatomy.hidden // anatomy.heads
    headers = read_headers(tiny_folder("qwen3"))
    without = {key: value for key, value in headers.config.items() if key != "head_dim"}
    assert resolve(without, headers.shapes).head_width == 16


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tiny_folder, tied):
    headers, anatomy = of_folder(tiny_folder("qwen2", tie_word_embeddings=tied))
    assert (anatomy.tied is tied and ("head", -1) in anatomy.shapes) or tied
    without = {key: value for key, value in headers.config.items() if key != "tie_word_embeddings"}
    assert resolve(without, headers.shapes).tied is False  # What Qwen2Config assumes.


@pytest.mark.parametrize("bias", [True, False])
def test_output_biases_are_seen_in_the_headers(tiny_folder, bias):
    _, anatomy = of_folder(tiny_folder("llama", attention_bias=bias, mlp_bias=not bias))
    assert all(anatomy.has_bias("attention_output", layer) == bias for layer in range(4))
    assert all(anatomy.has_bias("mlp_output", layer) != bias for layer in range(4))


@pytest.mark.parametrize(
    ("listed", "step", "dense"), [([0, 2], 1, (0, 2)), ([], 2, (0, 2)), ([1], 2, (0, 1, 2)), ([], 1, ())]
)
def test_dense_layers_of_a_mixture_follow_the_configuration(tiny, tiny_folder, listed, step, dense):
    _, anatomy = of_folder(tiny_folder("qwen3_moe", mlp_only_layers=listed, decoder_sparse_step=step))
    assert anatomy.dense_mlp_layers == dense
    hf, tokenizer = tiny("qwen3_moe", mlp_only_layers=listed, decoder_sparse_step=step)
    assert steer.wrap(hf, tokenizer).anatomy.dense_mlp_layers == dense
    for layer in set(range(4)) - set(dense):
        with pytest.raises(SteerError, match="experts"):
            anatomy.disk_name("mlp_output", layer)


@pytest.mark.parametrize("family", [name for name in TINY if "num_experts_per_tok" in TINY[name]])
def test_how_many_experts_a_token_chooses(tiny, tiny_folder, family):
    headers, anatomy = of_folder(tiny_folder(family))
    ids: list[int] = []

    def took(module, args, output):
        ids.append(output[1].shape[-1])  # The weights stand in the middle, whatever the family.

    hf, _ = tiny(family)
    router = anatomy.record.experts.router
    layer = hf.get_submodule(f"{anatomy.record.model.layers}.{anatomy.expert_layers[0]}.{router}")
    handle = layer.register_forward_hook(took)
    hf(torch.tensor([[5, 9, 14]]))
    handle.remove()
    assert ids == [anatomy.chosen]  # What the router itself returned.
    assert (anatomy.groups, anatomy.chosen_groups) == ((2, 1) if family == "deepseek_v3" else (1, 1))
    key = anatomy.record.numbers.chosen
    without = {name: value for name, value in headers.config.items() if name != key}
    assert resolve(without, headers.shapes).chosen == getattr(type(hf.config)(), key)


def test_dense_models_choose_no_experts(tiny_folder):
    assert of_folder(tiny_folder("llama"))[1].chosen == 0


def test_contributions(tiny_folder):
    assert of_folder(tiny_folder("llama"))[1].attention_contribution.kind == "identity"
    granite = of_folder(tiny_folder("granite"))[1].mlp_contribution
    assert (granite.kind, granite.multiplier) == ("scale", 0.22)
    gemma = of_folder(tiny_folder("gemma3_text"))[1]
    assert (gemma.attention_contribution.norm, gemma.mlp_contribution.norm) == (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    )
    headers = read_headers(tiny_folder("granite"))
    without = {key: value for key, value in headers.config.items() if key != "residual_multiplier"}
    assert resolve(without, headers.shapes).attention_contribution.multiplier == 1.0
    with pytest.raises(SteerError, match=r"residual_multiplier = 0"):
        resolve({**headers.config, "residual_multiplier": 0}, headers.shapes)


def test_a_family_without_a_record_shows_its_tensors_and_the_way_out(tiny_folder):
    headers = read_headers(tiny_folder("llama"))
    with pytest.raises(SteerError) as caught:
        resolve({**headers.config, "model_type": "novel"}, headers.shapes)
    text = str(caught.value)
    for part in (
        "'novel'",
        "model.layers.0.self_attn.o_proj.weight [48, 48]",
        "model.embed_tokens.weight",
        "anatomy=FILE",
        "docs/anatomy.md",
        "qwen3_moe",
    ):
        assert part in text
    assert "layers.1." not in text


def test_a_users_record_makes_an_unknown_family_known(tmp_path, tiny_folder):
    headers = read_headers(tiny_folder("llama"))
    path = tmp_path / "novel.yaml"
    path.write_text(
        (FAMILIES / "llama.yaml").read_text().replace("[llama]", "[novel]").replace("family: llama", "family: novel")
    )
    anatomy = resolve({**headers.config, "model_type": "novel"}, headers.shapes, read_record(path))
    assert anatomy.family == "novel" and anatomy.head_width == 12
    with pytest.raises(SteerError, match="describes novel"):
        resolve(headers.config, headers.shapes, read_record(path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 5, r"no tensor model\.layers\.4\.self_attn\.o_proj\.weight"),
        ("num_hidden_layers", None, "num_hidden_layers = None"),
        ("num_attention_heads", 5, "5 heads x head width"),
        ("hidden_size", 64, r"\(64, 4 heads"),
        ("num_attention_heads", "4", "whole number"),
        ("num_attention_heads", 0, "whole number from 1"),
        ("num_hidden_layers", 0, "whole number from 1"),
        ("hidden_size", -48, "whole number from 1"),
    ],
)
def test_numbers_that_do_not_fit_the_tensors(tiny_folder, key, value, words):
    headers = read_headers(tiny_folder("llama"))
    with pytest.raises(SteerError, match=words):
        resolve({**headers.config, key: value}, headers.shapes)


def test_a_quantised_checkpoint_without_plain_weights_says_so(tiny_folder):
    headers = read_headers(tiny_folder("llama"))
    packed = {name.replace("o_proj.weight", "o_proj.qweight"): shape for name, shape in headers.shapes.items()}
    with pytest.raises(SteerError, match=r"quantised \(gptq\)"):
        resolve({**headers.config, "quantization_config": {"quant_method": "gptq"}}, packed)


def test_modules_and_layers_out_of_range(tiny_folder):
    _, anatomy = of_folder(tiny_folder("llama"))
    for module, layer in (("attention_output", 4), ("mlp_output", -1)):
        with pytest.raises(SteerError, match="layers 0 to 3"):
            anatomy.disk_name(module, layer)
    with pytest.raises(SteerError, match="no module 'query'"):
        anatomy.disk_name("query", 0)


def test_shapes_of_a_packed_projection_come_from_the_module(tiny):
    hf, _ = tiny("llama")
    projection = hf.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(torch.zeros(1152, 1, dtype=torch.uint8), requires_grad=False)
    assert shapes_of(hf)["model.layers.0.self_attn.o_proj.weight"] == (48, 48)


def test_a_larger_models_text_part_is_read_as_transformers_reads_it(tiny, tmp_path):
    hf, tokenizer = tiny("qwen3_5_text")
    text = {**hf.config.to_dict(), "tie_word_embeddings": False, "attention_bias": False}
    whole = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": text, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    stored = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in hf.state_dict().items()}
    save_file(
        {**stored, "model.visual.patch.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    tokenizer.save_pretrained(tmp_path)
    _, anatomy = of_folder(tmp_path)
    plain = steer.wrap(hf, tokenizer).anatomy
    assert anatomy.numbers() == plain.numbers() and not anatomy.tied and anatomy.linear_layers == (0, 2)
    assert anatomy.output_bias("attention_output").key == "text_config.attention_bias"
    assert plain.output_bias("attention_output").key == "attention_bias"
    loaded = steer.load(str(tmp_path))
    assert type(loaded.hf) is type(hf) and loaded.anatomy.numbers() == plain.numbers()
    assert all(torch.equal(loaded.hf.state_dict()[name], tensor) for name, tensor in hf.state_dict().items())
    headers = read_headers(tmp_path)
    with pytest.raises(SteerError, match="no anatomy record for the family 'gemma3'"):
        resolve({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, headers.shapes)


def test_heads_of_two_widths(tiny, tiny_folder):
    _, anatomy = of_folder(tiny_folder("gemma4_text"))
    assert anatomy.head_width == 16 and [anatomy.head_width_of(layer) for layer in range(4)] == [16, 24, 16, 24]
    assert anatomy.site_layers("z") == (0, 2) and anatomy.site_layers("head_out") == (0, 1, 2, 3)
    model = steer.wrap(*tiny("gemma4_text"))
    with pytest.raises(SteerError, match=r"Layer 1 .* has heads of width 24, not 16, so it has no z"):
        model.taps.layers_of("z", (1,))


def test_a_boundless_number_of_layers_ends_at_the_first_that_is_missing(tiny_folder):
    headers = read_headers(tiny_folder("qwen3_next"))
    with pytest.raises(SteerError, match=r"no tensor model\.layers\.4\.self_attn"):
        resolve({**headers.config, "num_hidden_layers": 10**12}, headers.shapes)


def test_shapes_that_are_no_matrix_are_refused(tiny_folder):
    headers = read_headers(tiny_folder("llama"))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        with pytest.raises(SteerError, match="shape"):
            resolve(headers.config, {**headers.shapes, name: ()})


def test_prefixes_that_make_two_tensors_one_are_refused(tiny_folder):
    headers = read_headers(tiny_folder("qwen3_5_text"))
    twice = {**headers.shapes, "model.language_model.norm.weight": (48,)}
    with pytest.raises(SteerError, match=r"model\.norm\.weight and model\.language_model\.norm\.weight"):
        resolve(headers.config, twice)


def test_only_a_tied_head_is_the_embedding(tiny_folder):
    headers = read_headers(tiny_folder("qwen3"))
    without = {name: shape for name, shape in headers.shapes.items() if name != "lm_head.weight"}
    with pytest.raises(SteerError, match="no tensor for head"):
        resolve(headers.config, without).on_disk(Matrix(-1, "head"))


def test_experts_that_are_packed_in_part_are_left_out_or_refused(tiny_folder):
    """An edit of the plain ones alone would pass for one of the whole layer."""
    headers = read_headers(tiny_folder("qwen3_moe"))
    packed = {
        re.sub(r"(experts\.[23]\.\w+)\.weight$", r"\1.qweight", name): shape for name, shape in headers.shapes.items()
    }
    with pytest.raises(SteerError, match=r"Layer 1 .* has 2 experts in plain tensors and a router of 4"):
        resolve(headers.config, packed)
    anatomy = resolve({**headers.config, "quantization_config": {"quant_method": "gptq"}}, packed)
    assert anatomy.expert_layers == () and anatomy.dense_mlp_layers == (0, 2)
    direction = steer.Direction(torch.ones(4, 48), (0, 1, 2, 3), "resid_mid")
    with pytest.raises(SteerError, match="layers 1, 3: not all of the layer's experts are in plain tensors"):
        Patch.from_steering(steer.Steering((steer.ProjectOut(direction, "mlp_out"),)), anatomy)
