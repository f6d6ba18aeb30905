"""Lowering: a steering as rows of tables.

A place is (site, kind, layer). Of each kind a place has one slot per request:

| kind | row | what a token's row does |
|---|---|---|
| `add` | v, float32 | h += g·v |
| `project` | v̂, float32 | h −= g·v̂ v̂ᵀh, before `add` |
| `scale` | f per expert | where g holds: chosen weights × f |
| `bias` | added, forced in, forced out per expert | logits, then the family's own choice |

with a gate g per state of a token (prompt, opening, thinking, answer): 1 where the phase holds, times w for `project`.
The request's coefficient is in the rows already, see `steer.backends.vllm.request.effective`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steer.directions import unit_vector
from steer.errors import SteerError
from steer.expert_interventions import LARGEST
from steer.interventions import Add, BiasRouter, Intervention, ProjectOut, ScaleExperts, prepared
from steer.phases import State, phase_mask
from steer.ranges import ranges
from steer.sites import site as site_named
from steer.steering import Steering

Place = tuple[str, str, int]
"""Site, kind, layer."""
Gate = tuple[float, float, float, float]
"""What a row is multiplied by in the states PROMPT, OPENING, THINKING, ANSWER."""
STATES = (State.PROMPT, State.OPENING, State.THINKING, State.ANSWER)
HIDDEN = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Sites whose values have the hidden size; `resid_pre` of layer 0 only, which is what the embedding writes."""
KINDS = ("project", "add", "scale", "bias")


@dataclass(frozen=True, eq=False)
class Row:
    """What one slot holds at one place.

    Attributes:
        gate: per state.
        vector: of `add` (v) and `project` (v̂).
        factors: of `scale`, what chosen weights are multiplied by.
        renormalise: of `scale`.
        added, inward, outward: of `bias`.
    """

    gate: Gate
    vector: Float[Tensor, " hidden"] | None = None
    factors: Float[Tensor, " experts"] | None = None
    renormalise: bool = False
    added: Float[Tensor, " experts"] | None = None
    inward: Bool[Tensor, " experts"] | None = None
    outward: Bool[Tensor, " experts"] | None = None


@dataclass(frozen=True, eq=False)
class Lowered:
    """A steering, place by place.

    Attributes:
        rows: what is written where.
        marked: whether a phase between marks takes part.
        first_is_prompt: whether something acts before the prompt's last token.
        positional: whether it matters how long the prompt is: some phase but `all` takes part.
    """

    rows: dict[Place, Row] = field(repr=False)
    marked: bool
    first_is_prompt: bool
    positional: bool

    @property
    def bytes(self) -> int:
        """Memory of all rows."""
        tensors = [value for row in self.rows.values() for value in vars(row).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def places_of(steering: Steering, experts: int = 0) -> tuple[Place, ...]:
    """Return the places that a steering needs, in order.

    Raises:
        SteerError: vLLM has no form for an intervention, or two of them need the same place.
    """
    return tuple(sorted(_grouped(steering)))


def lower(steering: Steering, experts: int = 0, chosen: int = 0) -> Lowered:
    """Write a steering as rows.

    Args:
        steering: with the request's coefficient and phase in it, nothing in it idle.
        experts: how many a layer of the model has; 0 where there are none.
        chosen: of how many a token chooses; 0 where that is not known.

    Raises:
        SteerError: vLLM has no form for an intervention, two of them need the same place, or a number is not finite.
    """
    rows = {place: _row(place, found, experts, chosen) for place, found in sorted(_grouped(steering).items())}
    phases = {each.phase for each in steering.interventions}
    return Lowered(
        rows,
        marked=bool(phases & {"opening", "thinking", "answer"}),
        first_is_prompt=bool(phases & {"all", "prompt"}),
        positional=phases != {"all"},
    )


def gate(phase: str, weight: float = 1.0) -> Gate:
    """Return `weight` for the states of a phase and 0 for the others."""
    held = phase_mask(torch.tensor([list(STATES)]), phase)[0].tolist()
    prompt, opening, thinking, answer = (weight if holds else 0.0 for holds in held)
    return prompt, opening, thinking, answer


def _grouped(steering: Steering) -> dict[Place, list[Intervention]]:
    found: dict[Place, list[Intervention]] = {}
    added: dict[tuple[str, int], Intervention] = {}
    order = sorted(
        enumerate(steering.interventions), key=lambda pair: (site_named(pair[1].site).order, pair[0])
    )  # Forward order across sites, tuple order within one.
    for _, each in order:
        site, kind = _where(each)
        for layer in each.active_layers:
            _check_layer(site, layer, each)
            if kind == "project" and (site, layer) in added:
                raise SteerError(
                    f"ProjectOut comes after Add at {site} of layer {layer}",
                    "ProjectOut before Add, the order that vLLM's form has",
                    "Exchange the two, which is another steering, or use the hook form",
                )
            if kind == "add":
                added[site, layer] = each
            found.setdefault((site, kind, layer), []).append(each)
    for place, several in found.items():
        _check_together(place, several)
    return found


def _where(intervention: Intervention) -> tuple[str, str]:
    """Site and kind of an intervention as vLLM runs it."""
    if isinstance(intervention, ScaleExperts):
        return "router", "scale"
    if isinstance(intervention, BiasRouter):
        return "router_logits", "bias"
    what = f"{type(intervention).__name__} at {intervention.site}"
    if isinstance(intervention, Add):
        site = "attn_out" if intervention.site == "resid_mid" else intervention.site
        if site in HIDDEN:
            return site, "add"
    if isinstance(intervention, ProjectOut):
        if intervention.site in HIDDEN:
            return intervention.site, "project"
        if intervention.site == "head_out":
            remedy = "Serve the patch as LoRA (`steer export --as lora`), or a patched checkpoint (`steer apply`)"
            raise SteerError(f"{what} lies in the weights, and vLLM's form has no heads", "", remedy)
    raise SteerError(
        f"{what} has no form in vLLM",
        "Add (also at resid_mid) or ProjectOut at attn_out, mlp_out or resid_post, ScaleExperts or BiasRouter",
        "Use the hook form",
    )


def _check_layer(site: str, layer: int, intervention: Intervention) -> None:
    if site == "resid_pre" and layer > 0:
        raise SteerError(
            f"{type(intervention).__name__} at resid_pre of layer {layer} has no form in vLLM",
            "resid_pre of layer 0 only",
            f"resid_post of layer {layer - 1} is the same place",
        )


def _check_together(place: Place, several: list[Intervention]) -> None:
    site, kind, layer = place
    if len(several) == 1:
        return
    phases = sorted({each.phase for each in several})
    mergeable = kind == "add" or (
        kind == "scale" and not any(isinstance(each, ScaleExperts) and each.renormalise for each in several)
    )
    if not mergeable or len(phases) > 1:
        found = f"in the phases {', '.join(phases)}" if len(phases) > 1 else "one after the other"
        raise SteerError(
            f"{len(several)} {type(several[0]).__name__} act at {site} of layer {layer} {found}",
            "one of them per layer and request; Add and plain ScaleExperts of one phase are joined",
            "Join them into one, or use the hook form",
        )


def _row(place: Place, several: list[Intervention], experts: int, chosen: int) -> Row:
    _, kind, layer = place
    first = several[0]
    if kind == "project":
        assert isinstance(first, ProjectOut), "nothing else is projected out"
        vector = unit_vector(first.direction[layer]).float()
        return Row(gate(first.phase, _finite(first.weight, place)), vector=vector)
    if kind == "add":
        nothing = torch.zeros(())
        parts = [
            prepared(each, layer, 1.0, torch.float32)(nothing.expand(each.direction.width))
            for each in several
            if isinstance(each, Add)
        ]
        total = torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0].clone()
        _check_most(f"what is added at {place[0]} of layer {layer}", total)
        return Row(gate(first.phase), vector=total)
    if kind == "scale":
        return _scaling(place, several, experts, chosen)
    assert isinstance(first, BiasRouter), "nothing else is at home at router_logits"
    added = torch.zeros(experts)
    for at, expert, number in first.bias:
        if at == layer:
            added[expert] = number
    return Row(
        gate(first.phase),
        added=added,
        inward=_named(first.force_in, layer, experts),
        outward=_named(first.force_out, layer, experts),
    )


def _scaling(place: Place, several: Iterable[Intervention], experts: int, chosen: int) -> Row:
    layer, factors, renormalise, phase = place[2], torch.ones(experts), False, "all"
    for each in several:
        assert isinstance(each, ScaleExperts), "nothing else is at home at router"
        renormalise, phase = each.renormalise, each.phase
        factors[list(each.in_layer(layer))] *= each.factor(1.0)
    _check_most(f"what multiplies weights at {place[0]} of layer {layer}", factors)
    gone = (factors == 0).nonzero().flatten().tolist()
    if renormalise and len(gone) >= max(chosen, 1):
        raise SteerError(
            f"experts {ranges(gone)} of layer {layer} are taken out of the sum, and a token that chose only them has nothing to renormalise",
            f"fewer than the {max(chosen, 1)} that a token chooses",
            "Use a beta above 0, or leave renormalise out",
        )
    return Row(gate(phase), factors=factors, renormalise=renormalise)


def _named(pairs: Iterable[tuple[int, int]], layer: int, experts: int) -> Bool[Tensor, " experts"]:
    table = torch.zeros(experts, dtype=torch.bool)
    table[[expert for at, expert in pairs if at == layer]] = True
    return table


def _check_most(what: str, numbers: Tensor) -> None:
    """Refuse numbers whose sum over all layers may overflow: NaN would stay in cache blocks that others are given next."""
    if not bool((numbers.abs() <= LARGEST).all()):
        raise SteerError(f"{what} is beyond {LARGEST:g}", "numbers whose sums float32 holds", "Choose another coefficient")  # fmt: skip


def _finite(weight: float, place: Place) -> float:
    if not abs(weight) < torch.finfo(torch.float32).max:
        raise SteerError(f"the weight at {place[0]} of layer {place[2]} is {weight}", "a number that float32 holds")
    return weight
