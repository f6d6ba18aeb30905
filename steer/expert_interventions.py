"""Interventions on the routing of a mixture of experts: which experts a token goes to, and with what weight.

With z the router's logits of a token, S the experts that it chooses and w their weights, as the family computes them (after
its own normalisation and scaling), c the coefficient of the request:

| value | what changes | c |
|---|---|---|
| `BiasRouter` | z_e += b_e; then z_e = max z + m for e forced in, min z - m for e forced out; S and w follow | refused unless 1 |
| `ScaleExperts` | w_e *= 1 + c (beta - 1) for the chosen e that are named; S stays | the effect's share |

`ScaleExperts` is RICE (arXiv 2505.14681), forcing is SteerMoE's rule (arXiv 2509.09660), in float32 whatever the model's
dtype. Experts that every token passes (shared ones) are no choice and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

from steer.errors import SteerError
from steer.phases import check_phase

Expert = tuple[int, int]
"""Layer and expert, both counted from 0; the expert by its row of the router's matrix."""
MARGIN = 0.01
"""How far a forced expert's logit lies beyond all others (SteerMoE's constant)."""
LARGEST = 1e30
"""What numbers stay below, and factors above the inverse of: float32 holds them and their products with weights."""


@dataclass(frozen=True)
class ScaleExperts:
    """Multiply the weights with which chosen experts enter the sum, after the choice.

    Attributes:
        experts: (layer, expert) pairs, each once.
        beta: b, 0 or from 1e-30 to 1e30; 1 does nothing at all, 0 takes the experts out of the sum, RICE uses 64.
        renormalise: divide so that the weights of a token keep their original sum (2.5 on DeepSeek V3, below 1 on OLMoE);
            RICE's main method does not.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: no expert, one twice or a negative number; beta is negative or not finite; an unknown phase.
    """

    experts: tuple[Expert, ...]
    beta: float
    renormalise: bool = False
    phase: str = "all"
    site: ClassVar[str] = "router"

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", _pairs(self.experts, "ScaleExperts"))
        if not self.experts:
            raise SteerError("ScaleExperts names no expert", "(layer, expert) pairs", "Take them from expert scores: experts=scores.top(2)")  # fmt: skip
        beta = float(self.beta) + 0.0
        if not _holds(beta):
            raise SteerError(
                f"beta is {beta}",
                "a number of at least 0: 0 itself, or from 1e-30 to 1e30",
                "0 takes the experts out of the sum",
            )
        object.__setattr__(self, "beta", beta)
        check_phase(self.phase, None)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers with a named expert, increasing."""
        return tuple(sorted({layer for layer, _ in self.experts}))

    def factor(self, c: float) -> float:
        """Return 1 + c (beta - 1), what the weights are multiplied by; beta itself, unrounded, for c = 1.

        Raises:
            SteerError: it is negative, which would subtract what an expert writes, or float32 does not hold it.
        """
        factor = self.beta if c == 1 else 1.0 + c * (self.beta - 1.0)
        if not _holds(factor):
            raise SteerError(
                f"coefficient {c:g} with beta {self.beta:g} multiplies weights by {factor:g}",
                "a factor 1 + c (beta - 1) of at least 0: 0 itself, or from 1e-30 to 1e30",
                "Choose another coefficient or another beta",
            )
        return factor

    def is_zero(self, c: float) -> bool:
        """Whether nothing has to be done at coefficient c."""
        return self.factor(c) == 1

    def in_layer(self, layer: int) -> tuple[int, ...]:
        """Return the named experts of one layer, increasing."""
        return tuple(expert for at, expert in self.experts if at == layer)


@dataclass(frozen=True)
class BiasRouter:
    """Change the router's logits before the experts are chosen.

    Attributes:
        bias: (layer, expert, b): b is added to the expert's logit; from -1e30 to 1e30, and not 0.
        force_in: (layer, expert) that every token of the phase chooses: at most as many a layer as a token chooses.
        force_out: (layer, expert) that no token of the phase chooses: as many a layer as leave enough to choose from.
        phase: when; a word of `steer.phases.PHASES`.

    Raises:
        SteerError: nothing is named, something is named twice, a number is negative or not finite, an unknown phase.
    """

    bias: tuple[tuple[int, int, float], ...] = ()
    force_in: tuple[Expert, ...] = ()
    force_out: tuple[Expert, ...] = ()
    phase: str = "all"
    site: ClassVar[str] = "router_logits"

    def __post_init__(self) -> None:
        for name in ("force_in", "force_out"):
            object.__setattr__(self, name, _pairs(getattr(self, name), f"BiasRouter, {name},"))
        given = _rows(self.bias, "BiasRouter, bias,")
        if any(len(row) != 3 for row in given):
            raise SteerError(f"BiasRouter, bias, names {given}", "(layer, expert, what is added to its logit)")
        _pairs([row[:2] for row in given], "BiasRouter, bias,")
        rows = [(index(layer), index(expert), float(added) + 0.0) for layer, expert, added in given]
        wrong = [row for row in rows if not 0 < abs(row[2]) <= LARGEST]
        if wrong:
            raise SteerError(f"BiasRouter adds {wrong[0][2]} to expert {wrong[0][1]} of layer {wrong[0][0]}", "a number from -1e30 to 1e30, and not 0")  # fmt: skip
        object.__setattr__(self, "bias", tuple(sorted(rows)))
        both = sorted(set(self.force_in) & set(self.force_out))
        if both:
            raise SteerError(
                f"BiasRouter forces expert {both[0][1]} of layer {both[0][0]} in and out", "one of the two"
            )
        if not (self.bias or self.force_in or self.force_out):
            raise SteerError("BiasRouter names no expert, so it would do nothing", "bias, force_in or force_out")
        check_phase(self.phase, None)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Every expert that is named, in order."""
        return tuple(sorted({(layer, expert) for layer, expert, _ in self.bias} | {*self.force_in, *self.force_out}))

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers with a named expert, increasing."""
        return tuple(sorted({layer for layer, _ in self.experts}))

    def forced(self, layer: int) -> dict[int, bool]:
        """Return expert -> whether it is forced in, of those of one layer that are forced in or out."""
        sides = ((self.force_in, True), (self.force_out, False))
        return {expert: inward for side, inward in sides for at, expert in side if at == layer}

    def is_zero(self, c: float) -> bool:
        """Never: at coefficient 1, the only one, something is added or forced."""
        return False


def _holds(factor: float) -> bool:
    """Whether float32 holds a factor, and its inverse."""
    return factor == 0 or 1 / LARGEST <= factor <= LARGEST


def _pairs(pairs: Iterable[Iterable[int]], what: str) -> tuple[Expert, ...]:
    """Return (layer, expert) pairs in order."""
    found: list[Expert] = []
    for pair in _rows(pairs, what):
        try:
            layer, expert = map(index, pair)
        except (TypeError, ValueError):
            layer = expert = -1
        if min(layer, expert) < 0:
            raise SteerError(f"{what} names {pair!r}", "(layer, expert), both whole numbers counted from 0")
        found.append((layer, expert))
    if len(set(found)) < len(found):
        raise SteerError(f"{what} names an expert twice in {sorted(found)}", "each (layer, expert) once")
    return tuple(sorted(found))


def _rows(rows: Iterable[Iterable[Any]], what: str) -> list[tuple[Any, ...]]:
    """Return rows as tuples; a single row in place of several is refused."""
    try:
        return [tuple(row) for row in rows]
    except TypeError as error:
        raise SteerError(f"{what} names {rows!r}", "a list of rows, each in brackets of its own", "One expert is written ((3, 0),)") from error  # fmt: skip
