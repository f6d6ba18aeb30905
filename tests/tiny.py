"""Tiny random models of every family, and one tokenizer of whole words.

Weights are larger than a fresh initialisation, norm gains differ from one and biases from zero, so that a mistake in
any of them shows. Where the family allows it, head width differs from hidden / heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WORDS = [
    *SPECIAL, "<unk>", "system", "user", "assistant", *"0123456789", *"+-*/=;?.,:", *"abcdefghij",
    "so", "wait", "then", "hence", "the", "answer", "is", "let", "me", "think", "quick", "careful", "hello", "why",
]  # fmt: skip
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|> assistant"
    "{%- if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif -%}{%- endif -%}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 20, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True},
    "phi3": {"original_max_position_embeddings": 256},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": _ALTERNATING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": _ALTERNATING},
    "olmo2": {},
    "olmo3": {"sliding_window": 32, "layer_types": _ALTERNATING},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 24, "sliding_window": 32, "layer_types": _ALTERNATING, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(WORDS),
    },
    "qwen3_5_text": {"head_dim": 16, **_LINEAR},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **_EXPERTS, "mlp_only_layers": [0, 2], "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.22, "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, **_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
    },
    "glm4_moe": {
        "head_dim": 16, "n_routed_experts": 4, **_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "layer_types": _ALTERNATING},
    "qwen3_next": {"head_dim": 16, "num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 32, **_LINEAR},
    "qwen3_5_moe_text": {"head_dim": 16, "num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 32, **_LINEAR},
}  # fmt: skip


class Tiny(NamedTuple):
    """A random model in evaluation mode and its tokenizer; `steer.wrap(*tiny("llama"))`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with marks, a chat template and a thinking switch."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> Tiny:
    """Build a 4-layer model of `family` (a key of FAMILIES) under `seed`; `overrides` are configuration values."""
    settings = {**_COMMON, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
        if dtype != torch.float32:  # `.to(dtype)` would round the rotary frequencies too, which loading never does.
            exact, model = model, AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.load_state_dict(exact.state_dict())
    model.generation_config.update(pad_token_id=0, eos_token_id=2, bos_token_id=1)
    return Tiny(model.eval(), tokenizer())


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale)
        else:
            start = parameter.mean() if "norm" in name else 0.0
            parameter.copy_(start + 0.2 * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith(("layer_scalar", "e_score_correction_bias")):
            buffer.add_(0.2 * torch.rand(buffer.shape))
