"""The proof of the routers at start: the kernel adds experts up with the weights and ids that the changed router returns.

As `steer.anatomy.router_check` for the hook form, through further runs of the `laboratory`:

    out(4 w) - out(2 w)  ==  2 (out(2 w) - out(w))  != 0     the weights are used, and nothing else decides
    out(other logits)  !=  out                                the ids are
    rule(logits)  ==  the router's own choice                 where the rule is written out, see `routers.rule`
    what is forced in or out of a token's choice is           for random logits
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.backends.vllm.laboratory import Laboratory, Seen
from steer.backends.vllm.routers import Rerouting, rule
from steer.backends.vllm.tables import WIDTH, Table
from steer.errors import SteerError
from steer.routing import SELECTION_BIAS

WRITTEN = slice(1, 1 + WIDTH)
"""The tokens of the laboratory that have a slot."""
NEAR = 1e-4


def prove_routers(laboratory: Laboratory, plain: Seen, tolerance: float) -> None:
    """Prove the routers of the declared layers.

    Args:
        laboratory: with tables of zeros.
        plain: what it saw with these.
        tolerance: of the model's dtype.

    Raises:
        SteerError: a router is bypassed or ignored, or the choice that it makes is not to be changed.
    """
    scaled = {number: each.scale for number, each in laboratory.routers.items() if each.scale is not None}
    biased = {number: each.bias for number, each in laboratory.routers.items() if each.bias is not None}
    if scaled:
        twice, fourfold = (_run(laboratory, scaled, "factors", factor) for factor in (2.0, 4.0))
        for number in scaled:
            _check_sum(number, plain.experts[number], twice.experts[number], fourfold.experts[number], tolerance)
    if biased:
        for number in biased:
            _check_choice(laboratory.routers[number], number)
        other = _run(laboratory, biased, "added", 8.0)
        for number in biased:
            moved = (other.experts[number] - plain.experts[number])[WRITTEN].abs()
            if not float(moved.max()) > tolerance * float(plain.experts[number].abs().max()):
                raise _refusal(number, "the experts that its router returns")


def _run(laboratory: Laboratory, tables: dict[int, Table], name: str, size: float) -> Seen:
    """Run with one kind of table filled: factors of one size, or random logits."""
    before = {number: table[name][1].clone() for number, table in tables.items()}
    for number, table in tables.items():
        noise = torch.randn(before[number].shape, generator=torch.Generator().manual_seed(number))
        table[name][1].copy_(size * noise if name == "added" else torch.full_like(noise, size))
        table["gate"][WIDTH : 2 * WIDTH] = 1.0
    try:
        return laboratory.run()
    finally:
        for number, table in tables.items():
            table[name][1].copy_(before[number])
            table["gate"].zero_()


def _check_sum(number: int, once: Tensor, twice: Tensor, fourfold: Tensor, tolerance: float) -> None:
    first, second = (twice - once)[WRITTEN], (fourfold - twice)[WRITTEN]
    allowed = tolerance * float(fourfold.abs().max())
    if not float(first.abs().max()) > allowed:
        raise _refusal(number, "the weights that its router returns")
    if not float((2 * first - second).abs().max()) <= 4 * allowed:
        raise SteerError(
            f"the experts of layer {number} of vLLM's model are not added up with the weights that the router returns",
            "a weighted sum",
            "Steer no experts of this layer, or use the hook form",
        )


def _check_choice(router: Rerouting, number: int) -> None:
    """Check the choice that is made again, on random logits."""
    device, experts = router.code.device, int(router.bias["added"].shape[1]) if router.bias is not None else 0
    logits = torch.randn(2 * WIDTH, experts, generator=torch.Generator().manual_seed(number)).to(device)
    states = torch.zeros(len(logits), experts, device=device)
    weights, ids = router.own(states, logits, None)
    bias = getattr(router.router, SELECTION_BIAS, None)
    if bias is not None:
        found, again = rule(router.router, logits, bias.float().expand(logits.shape))
        same = bool((ids.long().sort().values == again.sort().values).all())
        if not same or not torch.allclose(found.sort().values, weights.float().sort().values, rtol=NEAR, atol=NEAR):
            raise SteerError(
                f"the router of layer {number} of vLLM's model, a {type(router.router).__name__}, chooses otherwise than by scores and selection bias",
                "a choice whose rule is known, since a bias per token enters it",
                "Steer with ScaleExperts, or use the hook form",
            )
    named = torch.zeros(3, *logits.shape, device=device)
    best, worst = ids[:, :1].long(), _never(ids, logits)
    named[1].scatter_(1, worst, 1.0)
    named[2].scatter_(1, best, 1.0)
    _, forced = router.again([named[0], named[1].bool(), named[2].bool()], states, logits, None)
    inside = (forced == worst).any(-1) & (forced != best).all(-1)
    if not bool(inside.all()):
        raise SteerError(
            f"forced choices do not hold in the router of layer {number} of vLLM's model, a {type(router.router).__name__}",
            "a choice that follows the logits",
            "Steer with ScaleExperts, or use the hook form",
        )


def _never(ids: Tensor, logits: Tensor) -> Tensor:
    """Return, per token, the expert of the lowest logit among those that were not chosen."""
    return logits.scatter(1, ids.long(), float("inf")).argmin(-1, keepdim=True)


def _refusal(number: int, what: str) -> SteerError:
    return SteerError(
        f"the kernel of layer {number} of vLLM's model ignores {what}",
        "a kernel that uses them, since that is where experts are steered",
        "Choose another kernel for experts (--moe-backend), or steer no experts",
    )
