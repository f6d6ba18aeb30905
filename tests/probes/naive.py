"""The oracle: one trace at a time, all activations stored by plain torch hooks, everything else in numpy float64.

Nothing here uses the sites, hooks, spans or anatomy of `steer`: places are named per family by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

Array = np.ndarray[Any, np.dtype[np.float64]]
BEFORE_MLP = {"gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}
NORM_AFTER = ("gemma2", "gemma3_text", "olmo2")


def activations(model: PreTrainedModel, family: str, tokens: list[int]) -> dict[str, Array]:
    """Return site -> (layer, token, width) for one sequence, batch 1, no padding."""
    store: dict[str, list[Array]] = {
        name: [] for name in ("resid_pre", "resid_post", "resid_mid", "z", "attn_raw", "mlp_raw", "attn_out")
    }
    handles = []

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        store[name].append(value[0].detach().double().numpy().copy())

    for layer in model.model.layers:
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: keep("resid_pre", args or kwargs["hidden_states"]), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, args, out: keep("resid_post", out)))
        projection = layer.self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(lambda _, args: keep("z", args)))
        handles.append(projection.register_forward_hook(lambda _, args, out: keep("attn_raw", out)))
        added = layer.post_attention_layernorm if family in NORM_AFTER else projection
        handles.append(added.register_forward_hook(lambda _, args, out: keep("attn_out", out)))
        if family != "olmo2":
            before = getattr(layer, BEFORE_MLP.get(family, "post_attention_layernorm"))
            handles.append(before.register_forward_pre_hook(lambda _, args: keep("resid_mid", args)))
        if hasattr(layer.mlp, "down_proj"):
            handles.append(layer.mlp.down_proj.register_forward_hook(lambda _, args, out: keep("mlp_raw", out)))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {name: np.stack(values) for name, values in store.items() if values}
    if family == "granite":
        found["attn_out"] = found["attn_out"] * model.config.residual_multiplier
    if family == "olmo2":
        found["resid_mid"] = found["resid_pre"] + found["attn_out"]
    return found


def positions(tokens: list[int], prompt: int, span: str, opening: int, closing: int, semicolon: int) -> list[int]:
    """Return the positions of a span by looking at the tokens alone."""
    start = tokens.index(opening)
    end = tokens.index(closing) + 1 if closing in tokens else len(tokens)
    return {
        "thinking": list(range(start, end)),
        "predicts_thinking": list(range(start - 1, end - 1)),
        "last_prompt_token": [prompt - 1],
        "answer": list(range(end, len(tokens))),
        "marker:;": [place for place in range(start, end) if tokens[place] == semicolon],
    }[span]


def over_rms(z: Array, raw: Array, epsilon: float) -> Array:
    """Return z over the root mean square of the raw attention output, token by token."""
    return z / np.sqrt((raw**2).mean(-1, keepdims=True) + epsilon)
