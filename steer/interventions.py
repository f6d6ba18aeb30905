"""Interventions: what is done to an activation, where and when, as small frozen values; and the one formula.

With v the raw vector of a layer, v̂ its unit vector, h an activation and c the coefficient of the request:

| value | added to h | c |
|---|---|---|
| `Add` | c·a·v | factor |
| `ProjectOut` | −c·w·v̂ (v̂ᵀh) | factor |
| `SetComponent` | (s − v̂ᵀh) v̂ | refused unless 1 |
| `Custom` | f(h, layer) | refused unless 1 |

What is done to the choice of experts has no vector: `ScaleExperts` and `BiasRouter` of `steer.expert_interventions`.

At `z` all of this happens per head. `ProjectOut` at `head_out` names heads and changes what these heads write
(ThinkEdit, arXiv 2503.22048, Eq. 6); its arithmetic lies in the weights, see `steer.operations.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.directions import Direction, unit_vector
from steer.errors import SteerError
from steer.expert_interventions import BiasRouter as BiasRouter
from steer.expert_interventions import ScaleExperts as ScaleExperts
from steer.phases import check_phase
from steer.ranges import ranges
from steer.sites import site as site_named

Change = Callable[[Float[Tensor, "*batch width"]], Float[Tensor, "*batch width"]]


class _InLayers:
    """What all interventions share."""

    layers: tuple[int, ...] | None

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers in which something may change, increasing."""
        return self.layers or ()


@dataclass(frozen=True)
class Add(_InLayers):
    """h += c·a·v with the raw vector v.

    Attributes:
        direction: v per layer.
        site: where; any site but `head_out` and those of routers.
        coefficient: a, any finite number; 0 does nothing at all.
        layers: some of the direction's layers; None takes all of them.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: something is unknown, out of range or does not fit together.
    """

    direction: Direction
    site: str
    coefficient: float = 1.0
    layers: tuple[int, ...] | None = None
    phase: str = "all"

    def __post_init__(self) -> None:
        _has_vectors(self.site, "Add")
        _settle(self, _layers_of(self.direction, self.layers), "coefficient")

    def is_zero(self, c: float) -> bool:
        """Whether nothing has to be done at coefficient c."""
        return c * self.coefficient == 0


@dataclass(frozen=True)
class ProjectOut(_InLayers):
    """h −= c·w·v̂ v̂ᵀh: the component along v shrinks by the factor 1 − c·w.

    Attributes:
        direction: v per layer, any length but 0.
        site: where; at `head_out` what the chosen heads write.
        weight: w, any finite number; 1 removes the component, 0 does nothing at all.
        layers: some of the direction's layers; None takes all of them. At `head_out` the heads say it.
        heads: (layer, head) pairs, required at `head_out` and forbidden elsewhere.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: something is unknown, out of range or does not fit together; a vector is zero.
    """

    direction: Direction
    site: str
    weight: float = 1.0
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    phase: str = "all"

    def __post_init__(self) -> None:
        layers = self._head_layers() if self.site == "head_out" else self._plain_layers()
        _settle(self, layers, "weight")
        self.direction.refuse_zero(layers, "cannot be projected out")

    def _plain_layers(self) -> tuple[int, ...]:
        if self.heads is not None:
            raise SteerError(
                f"ProjectOut at {self.site} names heads",
                "heads only at head_out",
                "Leave heads out, or use site='head_out'",
            )
        _has_vectors(self.site, "ProjectOut")
        return _layers_of(self.direction, self.layers)

    def _head_layers(self) -> tuple[int, ...]:
        if not self.heads:
            raise SteerError(
                "ProjectOut at head_out names no heads",
                "(layer, head) pairs",
                "Take them from head scores: heads=scores.top(3)",
            )
        pairs = [(int(layer), int(head)) for layer, head in self.heads]
        if len(set(pairs)) != len(pairs) or min(head for _, head in pairs) < 0:
            raise SteerError(f"ProjectOut names the heads {pairs}", "each (layer, head) once, counted from 0")
        object.__setattr__(self, "heads", tuple(sorted(pairs)))
        implied = tuple(sorted({layer for layer, _ in pairs}))
        if self.layers is not None and tuple(sorted(set(self.layers))) != implied:
            raise SteerError(
                f"ProjectOut at head_out names layers {list(self.layers)} beside heads in layers {ranges(implied)}",
                "layers left to the heads",
                "Leave layers out",
            )
        return _layers_of(self.direction, implied)

    def is_zero(self, c: float) -> bool:
        """Whether nothing has to be done at coefficient c."""
        return c * self.weight == 0


@dataclass(frozen=True)
class SetComponent(_InLayers):
    """h += (s − v̂ᵀh) v̂: the component along v becomes s.

    Attributes:
        direction: v per layer, any length but 0.
        site: where; any site but `head_out` and those of routers.
        value: s, in units of the activation; at `z` the same for every head.
        layers: some of the direction's layers; None takes all of them.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: something is unknown, out of range or does not fit together; a vector is zero.
    """

    direction: Direction
    site: str
    value: float
    layers: tuple[int, ...] | None = None
    phase: str = "all"

    def __post_init__(self) -> None:
        _has_vectors(self.site, "SetComponent")
        layers = _layers_of(self.direction, self.layers)
        _settle(self, layers, "value")
        self.direction.refuse_zero(layers, "has no component to set")

    def is_zero(self, c: float) -> bool:
        """Never: to set a component is to change it, whatever it was."""
        return False


@dataclass(frozen=True)
class Custom(_InLayers):
    """h += f(h, layer), for experiments: hook form only, no fingerprint, cannot be saved.

    Attributes:
        function: takes the activation (..., hidden), at `z` (..., heads, head width), in float32 or float64, and the
            layer; returns what is to be added, in the same shape.
        site: where; any site but `head_out` and those of routers.
        layers: counted from 0, at least one.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: something is unknown, or no layer is named.
    """

    function: Callable[[Tensor, int], Tensor]
    site: str
    layers: tuple[int, ...]
    phase: str = "all"

    def __post_init__(self) -> None:
        _has_vectors(self.site, "Custom")
        layers = tuple(sorted({int(layer) for layer in self.layers}))
        if not layers or layers[0] < 0:
            raise SteerError(f"Custom names the layers {list(self.layers)}", "at least one layer, counted from 0")
        check_phase(self.phase, None)
        object.__setattr__(self, "layers", layers)

    def is_zero(self, c: float) -> bool:
        """Never: nobody knows what the function does."""
        return False


Intervention = Add | ProjectOut | SetComponent | Custom | ScaleExperts | BiasRouter


def check_coefficient(intervention: Intervention, c: float) -> None:
    """Refuse a request coefficient that has no meaning for the intervention.

    Raises:
        SteerError: c is NaN or infinite, not 1 for `SetComponent`, `Custom` and `BiasRouter`, or makes the factor of
            `ScaleExperts` negative.
    """
    if not math.isfinite(c):
        raise SteerError(f"the coefficient is {c}", "a finite number")
    if isinstance(intervention, SetComponent | Custom | BiasRouter) and c != 1:
        raise SteerError(
            f"{type(intervention).__name__} was asked for with coefficient {c}",
            "coefficient 1, since setting a value, forcing a choice or calling a function has no strength",
            "Leave the coefficient out; leave the intervention out to switch it off",
        )
    if isinstance(intervention, ScaleExperts):
        intervention.factor(c)


def prepared(
    intervention: Intervention, layer: int, c: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Change:
    """Return the formula with its vectors already on the device: activation in, addition out.

    Args:
        intervention: any but one at `head_out`, `router_logits` or `router`.
        layer: one of its active layers.
        c: coefficient of the request.
        dtype: of the activations; float64 is computed in float64, everything else in float32.
        device: of the activations.

    Returns:
        A function of h, shape (..., hidden), at `z` (..., heads, head width), that returns what is added, in the
        precision of the computation, for the caller to add and cast once.

    Raises:
        SteerError: c has no meaning for the intervention, or the direction lacks the layer.
        ValueError: the intervention is at `head_out`, where the change lies in the weights, or at a router, where it is
            no addition to an activation.
    """
    check_coefficient(intervention, c)
    if isinstance(intervention, ScaleExperts | BiasRouter):
        raise ValueError("a change of the choice of experts is no addition to an activation: use steer.routing")
    if intervention.site == "head_out":
        raise ValueError("a change at head_out is made of weights: use steer.operations.low_rank")
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def moved(vector: Tensor) -> Tensor:
        return vector.to(device, wide)

    if isinstance(intervention, Custom):
        return lambda h: intervention.function(h.to(wide), layer).to(wide)
    if isinstance(intervention, Add):
        added = moved(intervention.direction[layer].double() * (c * intervention.coefficient))
        return lambda h: added.expand(h.shape)
    unit = moved(unit_vector(intervention.direction[layer]))
    if isinstance(intervention, ProjectOut):
        factor = -c * intervention.weight
        return lambda h: (factor * _along(h.to(wide), unit)) * unit
    value = intervention.value
    return lambda h: (value - _along(h.to(wide), unit)) * unit


def delta(
    intervention: Intervention, layer: int, h: Float[Tensor, "*batch width"], c: float = 1.0
) -> Float[Tensor, "*batch width"]:
    """Return what the intervention adds to h in one layer: the formula that every form shares.

    Args:
        intervention: any but one at `head_out`, `router_logits` or `router`.
        layer: one of its active layers.
        h: activations (..., hidden), at `z` (..., heads, head width), any floating dtype.
        c: coefficient of the request.

    Returns:
        The addition, in the shape of h, in float64 for float64 and in float32 for everything else.

    Raises:
        SteerError, ValueError: as `prepared`.
    """
    return prepared(intervention, layer, c, h.dtype, h.device)(h)


def _along(h: Float[Tensor, "*batch width"], unit: Float[Tensor, "*heads width"]) -> Float[Tensor, "*batch one"]:
    along: Tensor = torch.linalg.vecdot(h, unit, dim=-1)
    return along.unsqueeze(-1)


def _has_vectors(site: str, name: str) -> None:
    place = site_named(site)
    if place.routing:
        raise SteerError(
            f"{name} was asked for at {site}, where experts are chosen",
            "a site whose values are activations",
            "Use ScaleExperts or BiasRouter there; mlp_out is what the experts write together",
        )
    if not place.readable:
        raise SteerError(
            f"{name} was asked for at {site}, which is never a tensor of its own",
            "ProjectOut there, or another site",
            "Use attn_raw: what all heads write together, before the residual",
        )


def _layers_of(direction: Direction, layers: Iterable[int] | None) -> tuple[int, ...]:
    chosen = direction.layers if layers is None else tuple(sorted({int(layer) for layer in layers}))
    if not chosen:
        raise SteerError(
            "the intervention names no layers", "at least one layer", "Leave layers out to take all of the direction's"
        )
    for layer in chosen:
        direction[layer]
    return chosen


def _settle(intervention: Any, layers: tuple[int, ...], number: str) -> None:
    """Check what all interventions with a direction share, and store layers and number in their one form."""
    place = site_named(intervention.site)
    check_phase(intervention.phase, None)
    if place.per_head != (intervention.direction.site == "z"):
        raise SteerError(
            f"the direction was measured at {intervention.direction.site} and is used at {intervention.site}",
            "a direction at z for the site z, and one of the hidden size for every other site",
            "Collect the direction at a site of that width",
        )
    value = float(getattr(intervention, number)) + 0.0  # Minus zero has another text, hence another fingerprint.
    if not math.isfinite(value):
        raise SteerError(f"the {number} is {value}", "a finite number")
    object.__setattr__(intervention, number, value)
    object.__setattr__(intervention, "layers", layers)
