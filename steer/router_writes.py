"""Writes to the routers, in order, made ready for a device: logits before the choice, weights after it.

All arithmetic is in float32, in float64 where the router's own numbers are float64, and cast once to the dtype in which the
router returned them. Tokens outside a write's phase keep what the router returned, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.expert_interventions import MARGIN, BiasRouter, ScaleExperts
from steer.programs import Write, wide
from steer.report import Counter, Tick, Unmet
from steer.routing import Chooser, Routing


@dataclass
class _Scaling:
    """One or more neighbouring `ScaleExperts` of one phase: the factor of every expert."""

    phase: str
    factors: Float[Tensor, " experts"]
    renormalise: bool
    vanishes: int
    """How many experts have been taken out of the sum so far, by this step and those before."""


class WeightProgram:
    """All `ScaleExperts` of one layer: w_e *= 1 + c (beta - 1), and the original sum back where it is asked for.

    A pass costs one look-up and one multiplication per step; nothing waits for the device, unless experts are taken out and
    the rest renormalised while so many are named that a token may have chosen nothing else.

    Args:
        layer: counts from 0.
        writes: in order.
        experts: how many the layer has.
    """

    def __init__(self, layer: int, writes: Sequence[Write], experts: int) -> None:
        self.layer, self.writes, self.experts = layer, tuple(writes), experts
        self.counters = _counters(writes)
        self._ready: dict[tuple[torch.dtype, torch.device], list[_Scaling]] = {}

    def write(self, routing: Routing, tick: Tick) -> Routing:
        """Return the choice with its weights after all writes.

        Raises:
            SteerError: a token's weights are to be renormalised, and all its experts have been taken out of the sum.
        """
        for counter in self.counters:
            counter.touch(tick)
        ids, weights = routing.ids, routing.weights
        key = (wide(weights.dtype), weights.device)
        if key not in self._ready:
            self._ready[key] = self._prepare(*key)
        for step in self._ready[key]:
            factors = step.factors[ids]
            if step.phase != "all":
                factors = torch.where(tick.mask(step.phase, weights), factors, 1.0)
            scaled = weights * factors
            weights = self._renormalised(weights, scaled, step, tick) if step.renormalise else scaled
        return Routing(ids, weights.to(routing.weights.dtype))

    def _renormalised(self, before: Tensor, scaled: Tensor, step: _Scaling, tick: Tick) -> Tensor:
        left = scaled.sum(-1, keepdim=True)
        share = before.to(left.dtype).sum(-1, keepdim=True) / left
        if step.vanishes >= scaled.shape[-1]:
            gone = left == 0
            share = torch.where(gone, 1.0, share)  # Padding may lose all of its experts; nobody reads it.
            counted = tick.counted(step.phase, gone.device)
            number = int((gone[..., 0] if counted is None else gone[..., 0] & counted).sum())
            if number:
                raise SteerError(
                    f"all experts that {number} tokens chose in layer {self.layer} are taken out of the sum, so that there is nothing to renormalise",
                    "weights with a sum that is not 0",
                    "Take fewer experts out, use a beta above 0, or leave renormalise out",
                )
        return scaled * share

    def _prepare(self, dtype: torch.dtype, device: torch.device) -> list[_Scaling]:
        steps: list[_Scaling] = []
        gone: set[int] = set()
        for write in self.writes:
            scale = write.intervention
            assert isinstance(scale, ScaleExperts), "nothing else is at home at router"
            factors = torch.ones(self.experts, dtype=dtype)
            factors[list(scale.in_layer(self.layer))] = scale.factor(write.coefficient)
            gone |= set((factors == 0).nonzero().flatten().tolist())
            factors = factors.to(device)
            last = steps[-1] if steps else None
            if last is not None and last.phase == scale.phase and not (last.renormalise or scale.renormalise):
                last.factors = last.factors * factors
            else:
                steps.append(_Scaling(scale.phase, factors, scale.renormalise, len(gone)))
        return steps


@dataclass
class _Forcing:
    """One `BiasRouter` in one layer."""

    phase: str
    added: Float[Tensor, " experts"]
    inward: Tensor | None
    """(experts,), whether forced in; None where nothing is forced."""
    outward: Tensor | None
    unmet: Unmet


class LogitProgram:
    """All `BiasRouter` of one layer: z_e += b_e, then max z + m for what is forced in and min z - m for what is forced out.

    This is SteerMoE's rule (arXiv 2509.09660) without its log-softmax, which shifts all logits of a token alike: a router
    with softmax does not feel it, and the rule also holds for one with sigmoids. It is followed in float32 even in a model
    of bfloat16, whose logits would swallow m = 0.01.

    Where the family adds a selection bias s to its scores (DeepSeek V3, GLM 4.5), a logit alone does not decide. There what
    is forced in has s = max s + 1 + 5 R for the choice, what is forced out min s - 1 - 2 R, with R = max s - min s + 1:
    scores lie between 0 and 1 and a group counts by its two best, so a group with an expert that is forced in wins even if
    all its others are forced out, and a group left with one expert loses against one with two. The weights never see s.

    Args:
        layer: counts from 0.
        writes: in order.
        chooser: of the layer's router.
    """

    def __init__(self, layer: int, writes: Sequence[Write], chooser: Chooser) -> None:
        self.layer, self.writes, self.chooser = layer, tuple(writes), chooser
        self.counters = _counters(writes)
        self._ready: dict[tuple[torch.dtype, torch.device], list[_Forcing]] = {}

    def write(self, logits: Tensor, routing: Routing, tick: Tick) -> tuple[Tensor, Routing]:
        """Return the logits (batch, token, experts) after all writes, not yet cast, and the choice made from them."""
        for counter in self.counters:
            counter.touch(tick)
        dtype = wide(logits.dtype)
        if (dtype, logits.device) not in self._ready:
            self._ready[dtype, logits.device] = self._prepare(dtype, logits.device)
        steps = self._ready[dtype, logits.device]
        z, selection = logits.to(dtype), self.chooser.selection_bias
        own = None if selection is None else selection.to(logits.device)
        moved = None if own is None else own.expand(z.shape)
        for step in steps:
            mask = None if step.phase == "all" else tick.mask(step.phase, z)
            z = _where(mask, forced(z + step.added, step.inward, step.outward), z)
            if moved is not None and own is not None:
                moved = _where(mask, preferred(moved, own, step.inward, step.outward), moved)
        weights, ids = self.chooser(z.flatten(0, 1), None if moved is None else moved.flatten(0, 1))
        routing = self._inside(steps, routing, weights, ids, tick)
        for step in steps:
            _note(step, routing, tick)
        return z, routing

    def _inside(self, steps: Sequence[_Forcing], own: Routing, weights: Tensor, ids: Tensor, tick: Tick) -> Routing:
        """The new choice for the tokens that some write means, the router's own for the rest."""
        new_ids, new_weights = ids.reshape(own.ids.shape), weights.reshape(own.ids.shape).to(own.weights.dtype)
        phases = {step.phase for step in steps}
        if "all" in phases:
            return Routing(new_ids, new_weights)
        meant = torch.stack([tick.mask(phase, new_ids) for phase in phases]).any(0)
        return Routing(torch.where(meant, new_ids, own.ids), torch.where(meant, new_weights, own.weights))

    def _prepare(self, dtype: torch.dtype, device: torch.device) -> list[_Forcing]:
        steps = []
        for write in self.writes:
            router = write.intervention
            assert isinstance(router, BiasRouter) and write.unmet is not None, (
                "nothing else is at home at router_logits"
            )
            added = torch.zeros(self.chooser.experts, dtype=dtype)
            for layer, expert, number in router.bias:
                if layer == self.layer:
                    added[expert] = number
            inward, outward = (self._table(named, device) for named in (router.force_in, router.force_out))
            steps.append(_Forcing(router.phase, added.to(device), inward, outward, write.unmet))
        return steps

    def _table(self, named: Sequence[tuple[int, int]], device: torch.device) -> Tensor | None:
        here = [expert for layer, expert in named if layer == self.layer]
        table = torch.zeros(self.chooser.experts, dtype=torch.bool)
        table[here] = True
        return table.to(device) if here else None


def forced(z: Float[Tensor, "*token experts"], inward: Tensor | None, outward: Tensor | None) -> Tensor:
    """Return logits with what is named in (…, experts) beyond all others; None: nothing is."""
    high, low = z.amax(-1, keepdim=True) + MARGIN, z.amin(-1, keepdim=True) - MARGIN
    if inward is not None:
        z = torch.where(inward, high, z)
    return z if outward is None else torch.where(outward, low, z)


def preferred(
    moved: Float[Tensor, "*token experts"],
    own: Float[Tensor, " experts"],
    inward: Tensor | None,
    outward: Tensor | None,
) -> Tensor:
    """Return each token's selection bias after one write, see `LogitProgram`; `own` is the family's."""
    high, low = own.max(), own.min()
    reach = high - low + 1
    if inward is not None:
        moved = torch.where(inward, high + 1 + 5 * reach, moved)
    return moved if outward is None else torch.where(outward, low - 1 - 2 * reach, moved)


def _where(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if mask is None else torch.where(mask, new, old)


def _note(step: _Forcing, routing: Routing, tick: Tick) -> None:
    """Count the tokens for which what was forced did not hold."""
    if step.inward is None and step.outward is None:
        return
    chose = torch.zeros(*routing.ids.shape[:2], len(step.added), dtype=torch.bool, device=routing.ids.device)
    chose.scatter_(-1, routing.ids, True)
    missed = torch.zeros_like(chose)
    if step.inward is not None:
        missed |= step.inward & ~chose
    if step.outward is not None:
        missed |= step.outward & chose
    counted = tick.counted(step.phase, chose.device)
    step.unmet.add((missed if counted is None else missed & counted[..., None]).sum((0, 1)))


def _counters(writes: Sequence[Write]) -> tuple[Counter, ...]:
    return tuple({id(write.counter): write.counter for write in writes}.values())
