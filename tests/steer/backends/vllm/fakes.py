"""Models of the shapes that vLLM's have, without vLLM: what a layer is given and returns, where a block multiplies or norms.

| style | a layer returns | the stream is |
|---|---|---|
| `fused` (Qwen) | (hidden, residual) | their sum |
| `normed` (Gemma) | the same; a norm stands behind each block | their sum |
| `scaled` (Granite) | hidden; each block's output is multiplied | hidden |
| `forgetful` (Cohere) | (hidden, residual) | hidden: the residual is given and not used |
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import Place
from steer.backends.vllm.tables import Tables

HIDDEN, LAYERS, EXPERTS, CHOSEN = 16, 3, 8, 2
MULTIPLIER = 0.22
CPU = torch.device("cpu")


class Norm(nn.Module):
    """A root mean square norm that adds the residual first, as vLLM's does, in place."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        residual.add_(hidden)
        return self(residual), residual


class Attention(nn.Module):
    """The kernel: without a cache it returns what lay in memory."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.full_like(value, torch.nan)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.o_proj = Attention(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.o_proj(self.attn(hidden))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.up(hidden))


class FusedTopKRouter:
    """vLLM's router of Qwen and others, by plain formulas."""

    def __init__(self, renormalize: bool = False) -> None:
        self.top_k, self.renormalize, self.capture_fn = CHOSEN, renormalize, None

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        return self._compute_routing(hidden_states, router_logits, torch.int32, input_ids=None)

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids.to(indices_type or torch.int32)


class GroupedTopKRouter(FusedTopKRouter):
    """vLLM's router of DeepSeek V3 and GLM 4.5."""

    def __init__(self, bias: Tensor | None, groups: int = 2, open_groups: int = 1) -> None:
        super().__init__(renormalize=True)
        self.e_score_correction_bias, self.num_expert_group, self.topk_group = bias, groups, open_groups
        self.scoring_func, self.routed_scaling_factor = "sigmoid", 2.5

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        all_weights, all_ids = [], []
        for logits in router_logits.float():
            scores = logits.sigmoid()
            choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
            size = EXPERTS // self.num_expert_group
            worth = [float(choice[g * size : (g + 1) * size].topk(2).values.sum()) for g in range(self.num_expert_group)]  # fmt: skip
            best = sorted(range(self.num_expert_group), key=lambda group: -worth[group])[: self.topk_group]
            members = [expert for group in best for expert in range(group * size, (group + 1) * size)]
            ids = sorted(members, key=lambda expert: -float(choice[expert]))[: self.top_k]
            weights = scores[ids] / scores[ids].sum() * self.routed_scaling_factor
            all_weights.append(weights)
            all_ids.append(torch.tensor(ids))
        return torch.stack(all_weights), torch.stack(all_ids).to(indices_type or torch.int32)


class Experts(nn.Module):
    """The module that asks a router and adds the experts up. `kernel`: "modular", "ignores" its weights, or "alone"."""

    def __init__(self, router: Any, kernel: str = "modular") -> None:
        super().__init__()
        self.router, self.kernel = router, kernel
        self.quant_method = SimpleNamespace(is_monolithic=kernel == "alone")
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)

    def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
        weights, ids = self.router.select_experts(hidden, logits)
        if self.kernel == "ignores":
            weights = torch.ones_like(weights)
        out = torch.einsum("td,tkde->tke", hidden.float(), self.experts[ids.long()])
        return (out * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


class SparseMlp(nn.Module):
    def __init__(self, router: Any, kernel: str = "modular") -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), Experts(router, kernel)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.experts(hidden, self.gate(hidden))
        return out


class Layer(nn.Module):
    """A decoder layer of one of the styles."""

    def __init__(self, style: str, mlp: nn.Module) -> None:
        super().__init__()
        self.style, self.self_attn, self.mlp = style, SelfAttention(), mlp
        self.before, self.between = Norm(), Norm()
        if style == "normed":
            self.after_attention, self.after_mlp = Norm(), Norm()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if self.style == "scaled":
            hidden_states = hidden_states + MULTIPLIER * self.self_attn(self.before(hidden_states))
            return hidden_states + MULTIPLIER * self.mlp(self.between(hidden_states))
        if self.style == "forgetful":
            normed = self.before(hidden_states)
            return hidden_states + self.self_attn(normed) + self.mlp(normed), hidden_states.clone()
        if residual is None:
            residual = hidden_states.clone()
            hidden_states = self.before(hidden_states)
        else:
            hidden_states, residual = self.before(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        if self.style == "normed":
            hidden_states = self.after_attention(hidden_states)
        hidden_states, residual = self.between(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return self.after_mlp(hidden_states) if self.style == "normed" else hidden_states, residual


class Model(nn.Module):
    """A model of one stage, with the layers where vLLM has them."""

    def __init__(self, style: str = "fused", router: Any = None, kernel: str = "modular") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            Layer(style, Mlp() if router is None else SparseMlp(router(), kernel)) for _ in range(LAYERS)
        )
        self.model.norm, self.style = Norm(), style

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        hidden: Any = torch.zeros(len(positions), HIDDEN)
        residual = None
        for layer in self.model.layers:
            output = layer(positions, hidden, residual)
            hidden, residual = output if isinstance(output, tuple) else (output, None)
        if residual is None or self.style == "forgetful":
            return self.model.norm(hidden)
        return self.model.norm(hidden, residual)[0]


class Runner:
    """Of a model runner, what the laboratory calls."""

    def __init__(self, model: Model) -> None:
        self.model, self.runs = model, 0

    def _dummy_run(self, tokens: int, is_profile: bool, skip_eplb: bool) -> None:
        assert is_profile and skip_eplb
        self.runs += 1
        self.model(torch.arange(tokens))


def worker_of(model: Model) -> Any:
    """Of a worker, what the self-check reads."""
    known = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=known),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    return SimpleNamespace(model_runner=Runner(model), vllm_config=config)


def tables_of(places: tuple[Place, ...], style: str = "fused", known: bool = True, slots: int = 2) -> Tables:
    """Tables for some places; `known`: whether the multiplier of the style is."""
    parts: dict[str, Any] = {"attn_out": (("self_attn",), 1.0), "mlp_out": (("mlp",), 1.0)}
    if style == "scaled" and known:
        parts = {site: (paths, MULTIPLIER) for site, (paths, _) in parts.items()}
    if style == "normed" and known:
        parts = {"attn_out": (("after_attention",), 1.0), "mlp_out": (("after_mlp",), 1.0)}
    declared = Declared(
        store="nowhere",
        places=tuple(sorted(places)),
        slots=slots,
        hidden=HIDDEN,
        layers=LAYERS,
        experts=EXPERTS,
        chosen=CHOSEN,
        parts=parts,
    )
    return Tables(declared, declared.places, 16, CPU)
