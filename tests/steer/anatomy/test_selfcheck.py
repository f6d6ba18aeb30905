"""The self-check passes on every family and dtype, and refuses every way in which a record can be wrong."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import SteerError
from steer.anatomy import read_record, self_check
from steer.anatomy.record import FAMILIES, Contribution, LayerEnd, bundled
from steer.anatomy.selfcheck import TOKENS, tolerance_of
from tests.tiny import FAMILIES as TINY

EVERY_KIND = ("llama", "granite", "gemma2", "olmo2", "gemma4_text", "qwen3_5_text")
CASES = [(family, dtype) for family in TINY for dtype in (torch.float32, torch.bfloat16)]
CASES += [(family, dtype) for family in EVERY_KIND for dtype in (torch.float16, torch.float64)]
CASES += [("qwen3_moe", torch.float16), ("gpt_oss", torch.float16)]  # torch's grouped products know no float64.


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_family_passes_in_every_dtype(tiny, family, dtype):
    hf, tokenizer = tiny(family, dtype=dtype)
    model = steer.wrap(hf, tokenizer, self_check=False)
    check = self_check(model)
    assert check.layers == 4 and check.tokens == TOKENS and check.tolerance == tolerance_of(dtype)
    assert len(check.differences) == 5 + bool(model.anatomy.dense_mlp_layers)
    assert max(check.differences.values()) <= check.tolerance


def changed(family, **layer):
    record = bundled(family)
    return record.model_copy(update={"layer": record.layer.model_copy(update=layer)})


def contributing(family, **update):
    return bundled(family).model_copy(update={part: Contribution(**value) for part, value in update.items()})


def ending(**layer_end):
    return bundled("gemma4_text").model_copy(update={"layer_end": LayerEnd(**layer_end) if layer_end else None})


def linear(family, **parts):
    record = bundled(family)
    return record.model_copy(update={"linear_layer": record.linear_layer.model_copy(update=parts)})


WRONG = [
    ("llama", changed("llama", before_mlp="input_layernorm"), "resid_mid == resid_pre"),
    ("gemma2", changed("gemma2", before_mlp="post_attention_layernorm"), "resid_mid == resid_pre"),
    ("gemma2", contributing("gemma2", attention_contribution={"kind": "identity"}), "resid_mid == resid_pre"),
    (
        "gemma2",
        contributing("gemma2", mlp_contribution={"kind": "norm", "module": "pre_feedforward_layernorm"}),
        "mlp_out == pre_feed",
    ),
    ("olmo2", contributing("olmo2", mlp_contribution={"kind": "identity"}), "resid_post == resid_mid"),
    ("granite", contributing("granite", attention_contribution={"kind": "identity"}), "resid_mid == resid_pre"),
    (
        "granite",
        contributing("granite", mlp_contribution={"kind": "scale", "key": "logits_scaling"}),
        "resid_post == resid_mid",
    ),
    ("llama", changed("llama", attention_output="self_attn.q_proj"), "attn_out == attn_raw"),
    ("llama", changed("llama", mlp_output="mlp.gate_proj"), "mlp_out == mlp_raw"),
    ("llama", changed("llama", attention="mlp"), "attn_out"),
    ("olmo3", changed("olmo3", before_mlp="mlp.down_proj"), "resid_mid has vectors of shape (64,)"),
    ("glm4", contributing("glm4", attention_contribution={"kind": "identity"}), "resid_mid == resid_pre"),
    ("glm4", changed("glm4", before_mlp="post_self_attn_layernorm"), "resid_mid == resid_pre"),
    ("gemma4_text", ending(), "resid_post == resid_mid + mlp_out"),
    ("gemma4_text", ending(scale="layer_scalar"), "resid_post == layer_scalar x (resid_mid + mlp_out)"),
    ("gemma4_text", ending(extra=("post_per_layer_input_norm",)), "resid_post == resid_mid + mlp_out + post_per"),
    ("granitemoe", contributing("granitemoe", mlp_contribution={"kind": "identity"}), "resid_post == resid_mid"),
    (
        "qwen3_5_text",
        linear("qwen3_5_text", attention_output="linear_attn.in_proj_z"),
        "attn_raw has vectors of shape (32,)",
    ),
    ("gpt_oss", changed("gpt_oss", mlp="post_attention_layernorm"), "resid_post == resid_mid"),
    ("qwen3_next", linear("qwen3_next", attention="mlp.shared_expert"), "attn_out"),
    ("glm4_moe", changed("glm4_moe", attention="mlp"), "attn_out == attn_raw"),
    ("mixtral", changed("mixtral", mlp="mlp.gate"), "mlp_out has vectors of shape"),
]


@pytest.mark.parametrize(
    ("family", "record", "words"), WRONG, ids=[f"{family}-{index}" for index, (family, _, _) in enumerate(WRONG)]
)
def test_a_wrong_record_is_refused_by_the_identity_that_breaks(tiny, family, record, words):
    options = {"intermediate_size": 48} if words.startswith("mlp_out == mlp_raw") else {}
    hf, tokenizer = tiny(family, **options)
    with pytest.raises(SteerError) as caught:
        steer.wrap(hf, tokenizer, anatomy=record)
    text = str(caught.value)
    assert (
        words in text
        and f"'{family}'" in text
        and "in layer" in text
        and ("self_attn.o_proj (Linear)" in text or "linear_attn.out_proj (Linear)" in text)
        and "anatomy=FILE" in text
    )
    steer.wrap(hf, tokenizer)


def test_a_wrong_record_from_a_file_is_refused(tiny, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        (FAMILIES / "llama.yaml")
        .read_text()
        .replace("before_mlp: post_attention_layernorm", "before_mlp: input_layernorm")
    )
    assert read_record(path).layer.before_mlp == "input_layernorm"
    with pytest.raises(SteerError, match="resid_mid == resid_pre"):
        steer.wrap(*tiny("llama"), anatomy=path)


def test_a_path_that_leads_nowhere_shows_what_is_there(tiny):
    with pytest.raises(SteerError, match=r"'dense' is not among self_attn, mlp.*mlp\.down_proj \(Linear\)"):
        steer.wrap(*tiny("llama"), anatomy=changed("llama", mlp="dense"))


@pytest.mark.parametrize("site", ["extra writer", "changed layer end"])
def test_a_model_with_a_remainder_is_refused(tiny, site):
    hf, tokenizer = tiny("llama")
    layer = hf.model.layers[2]
    plain = layer.forward
    layer.forward = lambda hidden_states, **options: (
        plain(hidden_states, **options) + (0.1 * hidden_states if site == "extra writer" else 0.01)
    )
    with pytest.raises(SteerError, match=r"resid_post == resid_mid \+ mlp_out is off by .* in layer 2"):
        steer.wrap(hf, tokenizer)


def test_layers_in_another_order_are_refused(tiny):
    hf, tokenizer = tiny("llama")
    hf.model.layers = torch.nn.ModuleList([hf.model.layers[index] for index in (0, 2, 1, 3)])
    steer.wrap(hf, tokenizer)  # The order of the list is the order of running.
    plain, seen = hf.model.layers[1].forward, []
    hf.model.layers[1].forward = lambda hidden_states, **options: plain(
        seen.append(hidden_states) or hidden_states * 1.5, **options
    )
    with pytest.raises(SteerError, match="resid_mid == resid_pre"):
        steer.wrap(hf, tokenizer)


def test_the_check_leaves_the_model_as_it_was(tiny):
    hf, tokenizer = tiny("gemma2")
    hf.train()
    model = steer.wrap(hf, tokenizer)
    assert hf.training and not model.taps._handles
    assert all(parameter.grad is None for parameter in hf.parameters())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()) == 0


def test_nan_weights_are_refused(tiny):
    hf, tokenizer = tiny("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(SteerError, match=r"(?i)mlp_raw of layer 1 .* NaN or infinite.*dtype"):
        steer.wrap(hf, tokenizer)


def test_a_projection_of_another_width_than_the_heads_is_refused(tiny):
    with pytest.raises(SteerError, match=r"takes 48 numbers a token.*4 heads x 24 .*attention_output"):
        steer.wrap(*tiny("deepseek_v3"), anatomy=changed("deepseek_v3", attention_output="self_attn.q_a_proj"))
