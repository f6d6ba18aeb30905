"""An independent rewrite of one decoder layer, with edits written where the definition says, and no torch hook at all.

Both branches of the residual stream are spelled out, so an edit at `resid_mid` changes what the MLP reads *and* what
skips it. Formulas are written again here, one by one, on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Edits = dict[tuple[int, str], Callable[[Tensor], Tensor]]
WITHOUT_NORM_BEFORE = ("olmo2", "olmo3")
NORM_BEHIND = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3"), ("post_attention_layernorm", "post_feedforward_layernorm")
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}  # fmt: skip
NORM_BEFORE_MLP = dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text"), "pre_feedforward_layernorm")
SCALED = ("granite", "granitemoe")
SITES = ("resid_pre", "z", "attn_raw", "attn_out", "resid_mid", "mlp_raw", "mlp_out", "resid_post")


def unit(vector: Tensor) -> Tensor:
    return vector / (vector * vector).sum(-1, keepdim=True).sqrt()


def add(vector: Tensor, factor: float) -> Callable[[Tensor], Tensor]:
    return lambda h: h + factor * vector.to(h.dtype)


def project_out(vector: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    def edit(h: Tensor) -> Tensor:
        v = unit(vector.to(h.dtype))
        return h - weight * (h * v).sum(-1, keepdim=True) * v

    return edit


def set_component(vector: Tensor, value: float) -> Callable[[Tensor], Tensor]:
    def edit(h: Tensor) -> Tensor:
        v = unit(vector.to(h.dtype))
        return h + (value - (h * v).sum(-1, keepdim=True)) * v

    return edit


@contextmanager
def rewritten(hf: Any, edits: Edits, seen: dict[tuple[int, str], Tensor] | None = None) -> Iterator[None]:
    """Replace the forward of every layer, and of its two output projections, by this file's; put them back after."""
    family = hf.config.model_type
    originals = []

    def at(number: int, site: str, value: Tensor) -> Tensor:
        value = edits.get((number, site), lambda h: h)(value)
        if seen is not None:
            seen[number, site] = value
        return value

    def replace(module: Any, forward: Any) -> None:
        originals.append(module)
        module.forward = MethodType(forward, module)

    for number, layer in enumerate(hf.model.layers):
        replace(layer, _layer(family, number, at, hf.config))
        if hasattr(layer, "self_attn"):
            replace(layer.self_attn.o_proj, _attention_output(number, at, hf.config.num_attention_heads, edits))
        else:
            replace(layer.linear_attn.out_proj, _output(number, at, "attn_raw"))
        if hasattr(_mlp(layer), "down_proj"):
            replace(_mlp(layer).down_proj, _output(number, at, "mlp_raw"))
    try:
        yield
    finally:
        for module in originals:
            del module.forward


def _mlp(layer: Any) -> Any:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _layer(family: str, number: int, at: Any, config: Any) -> Any:
    scale = config.residual_multiplier if family in SCALED else 1.0
    behind_attention, behind_mlp = NORM_BEHIND.get(family, (None, None))

    def forward(layer: Any, hidden_states: Tensor, *more: Tensor, **options: Any) -> Tensor:
        stream = at(number, "resid_pre", hidden_states)
        inside = stream if family in WITHOUT_NORM_BEFORE else layer.input_layernorm(stream)
        attention = _attend(layer, inside, options)
        if behind_attention:
            attention = getattr(layer, behind_attention)(attention)
        stream = at(number, "resid_mid", stream + at(number, "attn_out", attention * scale))
        inside = stream
        if family not in WITHOUT_NORM_BEFORE:
            inside = getattr(layer, NORM_BEFORE_MLP.get(family, "post_attention_layernorm"))(stream)
        mlp = _first(_mlp(layer)(inside))
        if behind_mlp:
            mlp = getattr(layer, behind_mlp)(mlp)
        stream = stream + at(number, "mlp_out", mlp * scale)
        if family == "gemma4_text":
            gated = layer.act_fn(layer.per_layer_input_gate(stream)) * more[0]
            stream = stream + layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
            stream = stream * layer.layer_scalar
        return at(number, "resid_post", stream)

    return forward


def _attend(layer: Any, inside: Tensor, options: dict[str, Any]) -> Tensor:
    if hasattr(layer, "self_attn"):
        return _first(layer.self_attn(hidden_states=inside, **options))
    wanted = {"hidden_states": inside, "cache_params": None, "attention_mask": options.get("attention_mask")}
    return _first(layer.linear_attn(**wanted))


def _attention_output(number: int, at: Any, heads: int, edits: Edits) -> Any:
    def forward(projection: Any, z: Tensor) -> Tensor:
        z = at(number, "z", z.reshape(*z.shape[:-1], heads, -1))
        # One head's write after the other, each through its own columns.
        width, raw = z.shape[-1], torch.zeros(*z.shape[:-2], projection.weight.shape[0], dtype=z.dtype)
        for head in range(heads):
            wrote = linear(z[..., head, :], projection.weight[:, head * width : (head + 1) * width])
            raw = raw + edits.get((number, f"head_out {head}"), lambda h: h)(wrote)
        if projection.bias is not None:
            raw = raw + projection.bias
        return at(number, "attn_raw", raw)

    return forward


def _output(number: int, at: Any, site: str) -> Any:
    def forward(projection: Any, inside: Tensor) -> Tensor:
        return at(number, site, linear(inside, projection.weight, projection.bias))

    return forward
