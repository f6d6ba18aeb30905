"""The random models that other tests stand on: every family builds, runs, is reproducible, and is not degenerate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, WORDS, build, tokenizer

TEXT = "<|im_start|> user a = 3 ; ? a <|im_end|> <|im_start|> assistant <think> so a = 3 </think> a = 3"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_runs_and_is_a_function_of_its_seed(family):
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = [build(family, seed=seed).model(ids).logits for seed in (0, 0, 1)]
    assert logits[0].shape == (1, ids.shape[1], len(WORDS))
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert torch.isfinite(logits[0]).all() and 0.1 < logits[0].std() < 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_model_is_what_loading_its_folder_gives(family, tiny_folder):
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    built = build(family, dtype=torch.bfloat16).model
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder(family, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(built(ids).logits, loaded.eval()(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_gains_and_biases_are_not_neutral(family):
    for name, parameter in build(family).model.named_parameters():
        assert parameter.std() > 0.01, name


def test_some_head_width_is_not_hidden_over_heads():
    configs = [build(family).model.config for family in FAMILIES]
    assert any(getattr(c, "head_dim", None) not in (None, c.hidden_size // c.num_attention_heads) for c in configs)


def test_a_saved_folder_loads_as_the_same_model(tiny_folder):
    folder = tiny_folder("qwen3", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([words(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, build("qwen3").model(ids).logits)
    assert tiny_folder("qwen3", max_shard_size="100KB") == folder


def test_the_tokenizer_is_reversible_and_its_template_has_a_thinking_switch():
    words = tokenizer()
    assert words.decode(words(TEXT)["input_ids"]) == TEXT
    chat = [{"role": "user", "content": "hello ?"}]
    on = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    off = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert on.endswith("assistant") and off == on + " <think> </think>"
