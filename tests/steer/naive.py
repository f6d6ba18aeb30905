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
WITHOUT_NORM_BEFORE = ("olmo2",)
NORM_BEHIND = ("gemma2", "gemma3_text", "olmo2")
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
        replace(layer.self_attn.o_proj, _attention_output(number, at, hf.config.num_attention_heads, edits))
        if hasattr(layer.mlp, "down_proj"):
            replace(layer.mlp.down_proj, _mlp_output(number, at))
    try:
        yield
    finally:
        for module in originals:
            del module.forward


def _layer(family: str, number: int, at: Any, config: Any) -> Any:
    scale = config.residual_multiplier if family == "granite" else 1.0

    def forward(layer: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        stream = at(number, "resid_pre", hidden_states)
        inside = stream if family in WITHOUT_NORM_BEFORE else layer.input_layernorm(stream)
        attention = layer.self_attn(hidden_states=inside, **options)[0]
        if family in NORM_BEHIND:
            attention = layer.post_attention_layernorm(attention)
        stream = at(number, "resid_mid", stream + at(number, "attn_out", attention * scale))
        inside = stream
        if family not in WITHOUT_NORM_BEFORE:
            norm = layer.pre_feedforward_layernorm if family in NORM_BEHIND else layer.post_attention_layernorm
            inside = norm(stream)
        mlp = layer.mlp(inside)
        if family in NORM_BEHIND:
            mlp = layer.post_feedforward_layernorm(mlp)
        return at(number, "resid_post", stream + at(number, "mlp_out", mlp * scale))

    return forward


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


def _mlp_output(number: int, at: Any) -> Any:
    def forward(projection: Any, inside: Tensor) -> Tensor:
        return at(number, "mlp_raw", linear(inside, projection.weight, projection.bias))

    return forward
