"""Routers that look their change up: those of the declared layers, with something put before them.

vLLM's router of a layer returns the weights and logical ids of the chosen experts, and the kernel adds the experts up with
these. A changed router first lets the choice be made again for the tokens whose logits a request changes, then multiplies
weights; every other token keeps what the router returned, to the bit:

    z' = forced(z + b)  in float32, ids and weights by the family's own rule on z'
    w_e <- w_e f_e,  and the token's own sum back where it is asked for

Where the family adds a selection bias to its scores, vLLM's kernels take one bias for all tokens. There the rule is written
out here, with a bias per token, and `router_check` proves at start that it is the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer.backends.vllm.tables import Table, Tables
from steer.errors import SteerError
from steer.router_writes import forced, preferred
from steer.routing import SELECTION_BIAS

KNOWN = ("CPURouter", "FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter")
"""vLLM's routers that return each token's choice and have no other effect."""
KINDS = (("router_logits", "bias"), ("router", "scale"))


class Rerouting:
    """What takes the place of a router's `_compute_routing`.

    Args:
        owner: the module that asks the router, and gives its choice to the kernel.
        bias, scale: tables of the layer, or None.
        code, slot: of the step's tokens, see `steer.backends.vllm.tables.Tables`.
    """

    def __init__(self, owner: Any, bias: Table | None, scale: Table | None, code: Tensor, slot: Tensor) -> None:
        self.owner, self.bias, self.scale, self.code, self.slot = owner, bias, scale, code, slot
        self.router: Any = owner.router
        self.own: Callable[..., tuple[Tensor, Tensor]] = self.router._compute_routing

    def __call__(
        self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        weights, ids = self.own(hidden_states, router_logits, *args, **kwargs)
        count = router_logits.shape[0]
        code, slot = self.code[:count], self.slot[:count]
        if self.bias is not None:
            named = [self.bias[name].index_select(0, slot) for name in ("added", "inward", "outward")]
            new_weights, new_ids = self.again(named, hidden_states, router_logits, *args, **kwargs)
            acts = self.bias["gate"].index_select(0, code).unsqueeze(-1) > 0
            weights = torch.where(acts, new_weights.to(weights.dtype), weights)
            ids = torch.where(acts, new_ids.to(ids.dtype), ids)
        if self.scale is not None:
            weights = scaled(weights, ids, self.scale, code, slot)
        return weights, ids

    def again(
        self, named: Sequence[Tensor], hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the choice from changed logits, in float32; `named`: added, inward, outward, each (token, experts)."""
        added, inward, outward = named
        logits = forced(router_logits.float() + added, inward, outward)
        bias = getattr(self.router, SELECTION_BIAS, None)
        if bias is None:
            return self.own(hidden_states, logits, *args, **kwargs)
        bias = bias.float()
        return rule(self.router, logits, preferred(bias.expand(logits.shape), bias, inward, outward))


def scaled(
    weights: Float[Tensor, "token chosen"],
    ids: Int[Tensor, "token chosen"],
    table: Table,
    code: Int[Tensor, " token"],
    slot: Int[Tensor, " token"],
) -> Float[Tensor, "token chosen"]:
    """Return the weights with which chosen experts enter the sum, each token's by its own slot and state."""
    acts = table["gate"].index_select(0, code) > 0
    chosen = ids.long().clamp(0, table["factors"].shape[1] - 1)  # Padding may have chosen -1.
    factors = torch.where(acts.unsqueeze(-1), table["factors"][slot.unsqueeze(-1), chosen], 1.0)
    found = weights * factors
    left = found.sum(-1, keepdim=True)
    keeps = (acts & table["renormalise"].index_select(0, slot)).unsqueeze(-1) & (left != 0)
    return (found * torch.where(keeps, weights.sum(-1, keepdim=True) / left, 1.0)).to(weights.dtype)


def rule(
    router: Any, logits: Float[Tensor, "token experts"], selection: Float[Tensor, "token experts"]
) -> tuple[Float[Tensor, "token chosen"], Int[Tensor, "token chosen"]]:
    """Return weights and ids by the rule of families with a selection bias, the bias given token by token."""
    scores = logits.sigmoid() if router.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores + selection
    groups = getattr(router, "num_expert_group", None) or 1
    if groups > 1:
        grouped = choice.view(choice.shape[0], groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
        outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter(-1, best, False)
        choice = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(router.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * router.routed_scaling_factor, ids


def install(layers: Mapping[int, nn.Module], tables: Tables) -> dict[int, Rerouting]:
    """Let the router of every layer whose experts are declared look its change up.

    Returns:
        Layer -> what was put before its router.

    Raises:
        SteerError: a layer has no router, one that its kernel bypasses, or one whose choice cannot be changed.
    """
    found = {}
    for number in sorted({layer for site, kind, layer in tables.at if (site, kind) in KINDS}):
        owner = owner_of(layers[number], number)
        bias, scale = (tables.at.get((site, kind, number)) for site, kind in KINDS)
        _check(owner.router, number, bias is not None)
        found[number] = Rerouting(owner, bias, scale, tables.code, tables.slot)
        found[number].router._compute_routing = found[number]
    return found


def owner_of(layer: nn.Module, number: int) -> Any:
    """Return the module of a layer that asks a router for the choice of experts.

    Raises:
        SteerError: there is none or more than one, or its kernel chooses by itself.
    """
    found = {id(module.router): module for module in layer.modules() if hasattr(getattr(module, "router", None), "_compute_routing")}  # fmt: skip
    if len(found) != 1:
        raise SteerError(
            f"layer {number} of vLLM's model, a {type(layer).__name__}, has {len(found)} routers",
            "one, whose choice the kernel takes",
            "Steer no experts of this layer, or use the hook form",
        )
    (owner,) = found.values()
    kernels = [module for module in owner.modules() if getattr(getattr(module, "quant_method", None), "is_monolithic", False)]  # fmt: skip
    if kernels:
        raise SteerError(
            f"the experts of layer {number} run in one kernel that chooses by itself ({type(kernels[0].quant_method).__name__})",
            "a kernel that takes the router's choice, since that is where it is steered",
            "Choose another kernel for experts (--moe-backend), or steer no experts",
        )
    return owner


def _check(router: Any, number: int, logits: bool) -> None:
    name = type(router).__name__
    groups = getattr(router, "num_expert_group", None) or 1
    biased = getattr(router, SELECTION_BIAS, None) is not None
    hashed = any(getattr(router, each, None) is not None for each in ("_hash_indices_table", "hash_indices_table", "_bias_vl", "bias_vl"))  # fmt: skip
    reasons = [
        (name not in KNOWN, f"is a {name}", ", ".join(KNOWN)),
        ((getattr(router, "num_fused_shared_experts", 0) or 0) > 0, "also chooses shared experts", "experts that are chosen"),
        (logits and hashed, "chooses by the tokens' ids", "a choice that is made from logits, since these are changed"),
        (logits and groups > 1 and not biased, f"chooses among {groups} groups by their best expert", "a choice in which what is forced holds"),
        (logits and biased and getattr(router, "scoring_func", "") not in ("sigmoid", "softmax"), f"scores by {getattr(router, 'scoring_func', '')}", "sigmoid or softmax"),
    ]  # fmt: skip
    for holds, found, expected in reasons:
        if holds:
            what = "BiasRouter" if name in KNOWN and logits else "steering of experts"
            raise SteerError(
                f"the router of layer {number} {found}, which {what} does not know", expected, "Use the hook form"
            )
