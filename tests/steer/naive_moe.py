"""An independent rewrite of every family's block of experts: token by token, expert by expert, float64, no torch hook.

What is done to a router is written where its definition says: logits are changed before anything is chosen, weights after.
Forced experts are preferred by numbers that nothing else reaches, instead of by the smallest that suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

FAMILIES = (
    "qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "qwen3_next", "qwen3_5_moe_text", "qwen2_moe",
)  # fmt: skip
SIGMOID = ("deepseek_v3", "glm4_moe")
OVER_CHOSEN = ("gpt_oss", "granitemoe")
ALWAYS_NORMED = ("mixtral", "qwen3_5_moe_text")


@dataclass(frozen=True)
class Change:
    """What is done in one layer: `bias` to logits, then forcing, then `factors` of the weights of experts."""

    bias: dict[int, float] = field(default_factory=dict)
    force_in: tuple[int, ...] = ()
    force_out: tuple[int, ...] = ()
    factors: dict[int, float] = field(default_factory=dict)
    renormalise: bool = False
    acts: Callable[[int], bool] = lambda place: True


def block_of(layer: Any) -> Any:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def router_of(layer: Any) -> Any:
    block = block_of(layer)
    return getattr(block, "gate", None) or getattr(block, "router", None)


@contextmanager
def rewritten(hf: Any, changes: dict[int, Change], seen: dict[int, list[Any]] | None = None) -> Iterator[None]:
    """Replace the forward of every block of experts by this file's; put them back after.

    `seen` gets per layer one (ids, weights) per token.
    """
    originals = []
    for number, layer in enumerate(hf.model.layers):
        block = block_of(layer)
        if hasattr(block, "experts"):
            originals.append(block)
            block.forward = MethodType(_block(hf.config, changes.get(number), number, seen), block)
    try:
        yield
    finally:
        for block in originals:
            del block.forward


def _block(config: Any, change: Change | None, number: int, seen: dict[int, list[Any]] | None) -> Any:
    family = config.model_type

    def forward(block: Any, hidden: Tensor) -> Any:
        rows, out = hidden.reshape(-1, hidden.shape[-1]), []
        router = getattr(block, "gate", None) or block.router
        for place, h in enumerate(rows):
            z = (router.weight.double() @ h.double()).tolist()
            if family == "gpt_oss":
                z = [a + b for a, b in zip(z, router.bias.double().tolist(), strict=True)]
            here = change if change is not None and change.acts(place % hidden.shape[1]) else Change()
            ids, weights = choose(family, config, router, z, here)
            if seen is not None:
                seen.setdefault(number, []).append((ids, weights))
            total = sum(w * _expert(family, block.experts, e, h) for e, w in zip(ids, weights, strict=True) if w != 0)
            out.append(total + _shared(block, h) if torch.is_tensor(total) else _shared(block, h) + torch.zeros_like(h))
        found = torch.stack(out).reshape(hidden.shape)
        return (found, None) if family == "gpt_oss" else found

    return forward


def choose(family: str, config: Any, router: Any, z: list[float], change: Change) -> tuple[list[int], list[float]]:
    """Ids and weights of one token."""
    z = [value + change.bias.get(expert, 0.0) for expert, value in enumerate(z)]
    high, low = max(z) + 0.01, min(z) - 0.01
    for expert in change.force_in:
        z[expert] = high
    for expert in change.force_out:
        z[expert] = low
    exp = [float(torch.tensor(value, dtype=torch.float64).exp()) for value in z]
    top = config.num_experts_per_tok
    if family in SIGMOID:
        scores = [e / (1 + e) for e in exp]
        preferred = [s + b for s, b in zip(scores, router.e_score_correction_bias.double().tolist(), strict=True)]
        for expert in change.force_in:
            preferred[expert] += 1e9
        for expert in change.force_out:
            preferred[expert] -= 1e3
        ids = _of_groups(preferred, config.n_group, config.topk_group, top)
        weights = [scores[expert] for expert in ids]
        weights = [w / sum(weights) for w in weights] if config.norm_topk_prob else weights
        weights = [w * config.routed_scaling_factor for w in weights]
    else:
        ids = sorted(range(len(z)), key=lambda expert: -z[expert])[:top]
        among = ids if family in OVER_CHOSEN else range(len(z))
        weights = [exp[expert] / sum(exp[other] for other in among) for expert in ids]
        if family in ALWAYS_NORMED or getattr(config, "norm_topk_prob", False):
            weights = [w / sum(weights) for w in weights]
    scaled = [w * change.factors.get(expert, 1.0) for expert, w in zip(ids, weights, strict=True)]
    if change.renormalise:
        scaled = [w * sum(weights) / sum(scaled) for w in scaled]
    return ids, scaled


def _of_groups(scores: list[float], groups: int, open_groups: int, top: int) -> list[int]:
    size = len(scores) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: -worth[g])[:open_groups]
    return sorted((e for g in best for e in members[g]), key=lambda e: -scores[e])[:top]


def _expert(family: str, experts: Any, expert: int, h: Tensor) -> Tensor:
    up_gate, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if family == "gpt_oss":
        both = h @ up_gate + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + experts.down_proj_bias[expert]
    half = up_gate.shape[0] // 2
    return linear(silu(linear(h, up_gate[:half])) * linear(h, up_gate[half:]), down)


def _shared(block: Any, h: Tensor) -> Tensor | float:
    if hasattr(block, "shared_experts"):
        found: Tensor = block.shared_experts(h)
        return found
    if hasattr(block, "shared_expert"):
        return torch.sigmoid(block.shared_expert_gate(h)) * block.shared_expert(h)
    return 0.0
