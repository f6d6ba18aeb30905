"""The proof that a write at a router has its effect, made once per layer before the first such write.

A few random states are sent through the layer's block of experts, and nothing else of the model:

    the router is called                                 not so where one kernel does all, which bypasses every hook
    out(4 w) - out(2 w)  ==  2 (out(2 w) - out(w))  != 0  the block adds its experts up with the weights that the router returns
    out(other experts)  !=  out                          and takes the experts that it returns
    rule(logits)  ==  (ids, weights)                     the family's rule, applied to the logits again, gives what it gave

The last one is asked only where logits are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steer.anatomy.modules import LayerPlaces
from steer.anatomy.resolve import Anatomy
from steer.anatomy.selfcheck import TOLERANCES
from steer.errors import SteerError
from steer.programs import wide
from steer.routing import Chooser, chosen, returned

STATES = 8
REMEDY = (
    "Load the model so that its blocks call their routers: `use_kernels=False`, no fused or quantised expert kernels"
)

Rewrite = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def prove_router(place: LayerPlaces, anatomy: Anatomy, layer: int, site: str, dtype: torch.dtype) -> Chooser | None:
    """Prove that writes at a site of one router change what its block returns, and as they should.

    Args:
        place: the layer's modules.
        anatomy: counts hidden size and experts.
        layer: for messages.
        site: `router` or `router_logits`.
        dtype: of the residual stream.

    Returns:
        The family's rule, for `router_logits`; None for `router`.

    Raises:
        SteerError: the router is bypassed, ignored, or of a family whose rule is another.
    """
    assert place.router is not None, "Taps.check_place refuses layers without experts"
    where = f"layer {layer} of this {anatomy.family} model"
    device = next((part.device for part in place.mlp.parameters() if part.device.type != "meta"), torch.device("cpu"))
    states = torch.randn(1, STATES, anatomy.hidden, generator=torch.Generator().manual_seed(layer))
    block = _Block(place.mlp, place.router, states.to(device, dtype), where)
    _check_effect(block, anatomy.experts, where)
    return _chooser(block, place.router, where) if site == "router_logits" else None


class _Block:
    """A layer's block of experts on fixed states, with what its router returns rewritten."""

    def __init__(self, block: nn.Module, router: nn.Module, states: Tensor, where: str) -> None:
        self.block, self.router, self.states, self.where = block, router, states, where
        self.routed: Any = None

    @torch.no_grad()
    def __call__(self, rewrite: Rewrite) -> Tensor:
        """Return what the block returns when (weights, ids) are rewritten; `routed` is what the router had returned."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.routed = output
            _, weights, ids = chosen(output, self.where)
            return returned(output, *rewrite(weights, ids))

        handle = self.router.register_forward_hook(hook)
        try:
            output = self.block(self.states.clone())
        finally:
            handle.remove()
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found.to(wide(found.dtype))


def _times(factor: int) -> Rewrite:
    return lambda weights, ids: (weights * factor, ids)


def _check_effect(block: _Block, experts: int, where: str) -> None:
    once = block(_times(1))
    if block.routed is None:
        raise SteerError(
            f"the experts of {where} run in one kernel, which bypasses the router as a module",
            "a block that calls its router, since its choice is written there",
            REMEDY,
        )
    rows = chosen(block.routed, where)[0].shape
    if rows != (STATES, experts):
        raise SteerError(
            f"the router of {where} returned logits of shape {tuple(rows)} for {STATES} tokens",
            f"{(STATES, experts)}",
            "Correct `experts: router` in a copy of the record and give it with anatomy=FILE",
        )
    twice, fourfold = block(_times(2)), block(_times(4))
    others = block(lambda weights, ids: (weights, (ids + 1) % experts))
    dtypes = (block.states.dtype, chosen(block.routed, where)[1].dtype)
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes) * float(fourfold.abs().max())
    first, second = twice - once, fourfold - twice
    for what, changed in (("weights", first), ("experts", others - once)):
        if not bool((changed.abs() > tolerance).any()):
            raise SteerError(
                f"the block of experts of {where} ignores the {what} that its router returns",
                "a block that uses them, since the choice of experts is written there",
                REMEDY,
            )
    if not bool(((2 * first - second).abs() <= 4 * tolerance).all()):
        raise SteerError(
            f"the block of experts of {where} does not add its experts up with the weights that its router returns",
            "a weighted sum",
            REMEDY,
        )


def _chooser(block: _Block, router: nn.Module, where: str) -> Chooser:
    chooser = Chooser(router, where)
    logits, weights, ids = chosen(block.routed, where)
    exact = logits.to(wide(logits.dtype))
    bias = chooser.selection_bias
    with torch.no_grad():
        found, again = chooser(exact, None if bias is None else bias.to(exact.device).expand(exact.shape))
    tolerance = TOLERANCES.get(weights.dtype, TOLERANCES[torch.bfloat16])
    same = (ids.sort().values == again.sort().values).all(-1)
    ties = (exact.gather(1, ids).sort().values == exact.gather(1, again).sort().values).all(-1)
    near = torch.isclose(
        weights.to(found.dtype).sort().values, found.sort().values, rtol=tolerance, atol=tolerance * 1e-3
    )
    if not bool((same | ties).all() and near.all()):
        raise SteerError(
            f"the rule of the router of {where}, a {type(router).__name__}, applied again to the logits that it returned, gives another choice",
            "a choice that is made from these logits alone",
            "Use ScaleExperts, which needs no rule, or a transformers version that this family's record was read off",
        )
    return chooser
