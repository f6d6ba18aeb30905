"""Steering: an ordered tuple of interventions made for a model; its file form is in `steer.steering_file`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from steer import expert_range
from steer.anatomy.resolve import Anatomy
from steer.directions import Direction
from steer.errors import SteerError
from steer.expert_interventions import Expert
from steer.identity import ModelIdentity, canonical, check_same, digest, mix
from steer.interventions import (
    Add,
    BiasRouter,
    Custom,
    Intervention,
    ProjectOut,
    ScaleExperts,
    SetComponent,
    check_coefficient,
)
from steer.ranges import ranges

Directed = Add | ProjectOut | SetComponent
Savable = Directed | ScaleExperts | BiasRouter
KINDS: dict[str, type[Savable]] = {
    "add": Add,
    "project_out": ProjectOut,
    "set_component": SetComponent,
    "scale_experts": ScaleExperts,
    "bias_router": BiasRouter,
}
STRENGTH = {Add: "coefficient", ProjectOut: "weight", ScaleExperts: "beta"}
MOST = 12
"""Experts that a sentence names before it only counts."""


@dataclass(frozen=True)
class Steering:
    """Interventions in order: forward order across sites, tuple order within a site, each seeing what came before.

    Attributes:
        interventions: at least one.
        model: what it was made for; None takes it from the directions. No part of the fingerprint.
        name: for the reader; no part of the fingerprint.

    Raises:
        SteerError: there is no intervention, or the directions come from different models.
    """

    interventions: tuple[Intervention, ...]
    model: ModelIdentity | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        if not self.interventions:
            raise SteerError("the steering has no intervention, so it would do nothing", "at least one")
        model = self.model
        for direction in self.directions:
            model = mix(model, direction.model, "the directions of the steering")
        object.__setattr__(self, "model", model)

    def __str__(self) -> str:
        head = f"steering {self.name!r}" if self.name else "steering"
        return "\n".join(
            [
                f"{head}, {len(self.interventions)} intervention{'s' * (len(self.interventions) != 1)}",
                *(f"  {sentence(each)}" for each in self.interventions),
            ]
        )

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(sentence(each))}</li>" for each in self.interventions)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><ol>{items}</ol>"

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Every direction once, in order of first use."""
        found: dict[Direction, None] = {}
        for intervention in self.interventions:
            if isinstance(intervention, Directed):
                found[intervention.direction] = None
        return tuple(found)

    @property
    def has_fingerprint(self) -> bool:
        """False where a `Custom` function takes part: nobody can say whether two functions are the same."""
        return not any(isinstance(intervention, Custom) for intervention in self.interventions)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the steering does: what, where, when, how strongly, with which vectors.

        Raises:
            SteerError: a `Custom` intervention takes part.
        """
        return self._hash(strength=True)

    @cached_property
    def vectors_id(self) -> str:
        """The fingerprint without coefficients, weights and beta: what has to be loaded once to serve every strength.

        Raises:
            SteerError: a `Custom` intervention takes part.
        """
        return self._hash(strength=False)

    def _hash(self, strength: bool) -> str:
        rows = []
        for intervention in self.savable("has no fingerprint"):
            row = as_json(intervention)
            if isinstance(intervention, Directed):
                row["direction"] = intervention.direction.only(intervention.active_layers).fingerprint
            if not strength:
                row.pop(STRENGTH.get(type(intervention), ""), None)
            rows.append(row)
        return digest([canonical(rows).encode()])

    def savable(self, otherwise: str) -> list[Savable]:
        """Return the interventions where all can be written down.

        Args:
            otherwise: what follows from a `Custom` function, for the message.

        Raises:
            SteerError: a `Custom` intervention takes part.
        """
        savable = [intervention for intervention in self.interventions if not isinstance(intervention, Custom)]
        if len(savable) < len(self.interventions):
            raise SteerError(
                f"the steering holds a Custom function, so it {otherwise}",
                "interventions that can be written down",
                "Use it as a hook within one program only",
            )
        return savable

    def scaled(self, c: float) -> Steering:
        """Return the steering with the request coefficient c multiplied into every coefficient and weight.

        The beta of `ScaleExperts` becomes 1 + c (beta - 1).

        Raises:
            SteerError: c is not finite, not 1 where a `SetComponent`, `BiasRouter` or `Custom` takes part, or makes a
                beta negative.
        """
        changed = []
        for intervention in self.interventions:
            check_coefficient(intervention, c)
            if isinstance(intervention, Add):
                intervention = replace(intervention, coefficient=c * intervention.coefficient)
            elif isinstance(intervention, ProjectOut):
                intervention = replace(intervention, weight=c * intervention.weight)
            elif isinstance(intervention, ScaleExperts):
                intervention = replace(intervention, beta=intervention.factor(c))
            changed.append(intervention)
        return replace(self, interventions=tuple(changed))

    def check(self, anatomy: Anatomy, identity: ModelIdentity | None = None) -> None:
        """Refuse a model that the steering does not fit; warn when only its weights differ.

        Args:
            anatomy: counts layers, heads and experts, and knows hidden size and head width.
            identity: of the model at hand, where known.

        Raises:
            SteerError: another shape; a layer, a head, an expert or a width out of range; experts of a layer that has
                none; more experts forced in, or left after forcing out, than a token can choose.
        """
        check_same(self.model, identity, f"the steering {self.name!r}" if self.name else "the steering")
        for intervention in self.interventions:
            _check_range(intervention, anatomy)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write `name.yaml` and, where there are directions, `name.safetensors` beside it; return the first path.

        Raises:
            SteerError: another suffix, a file that exists, or a `Custom` intervention.
            OSError: the disk or the permissions refuse.
        """
        saved: Path = import_module("steer.steering_file").save(self, Path(path), overwrite)
        return saved

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote, or a reader edited.

        Raises:
            SteerError: a file is missing, damaged or of another kind or version, holds unknown keys or values out of
                range, or the two files do not belong together.
        """
        loaded: Steering = import_module("steer.steering_file").load(Path(path))
        return loaded


def as_json(intervention: Savable) -> dict[str, Any]:
    """Return everything but the direction."""
    values = {
        field.name: getattr(intervention, field.name) for field in fields(intervention) if field.name != "direction"
    }
    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    if "heads" in plain:
        plain.pop("layers")
    return {"kind": next(word for word, kind in KINDS.items() if type(intervention) is kind)} | plain


def sentence(intervention: Intervention) -> str:
    """Say an intervention on one line, such as "Add at attn_out, layers 3-5, coefficient 0.5, phase thinking"."""
    parts = [f"{type(intervention).__name__} at {intervention.site}", f"layers {ranges(intervention.active_layers)}"]
    if isinstance(intervention, ProjectOut) and intervention.heads:
        parts[1] = "heads " + " ".join(f"{layer}.{head}" for layer, head in intervention.heads)
    if isinstance(intervention, ScaleExperts):
        parts[1:] = [_experts("experts", intervention.experts), f"beta {intervention.beta:g}"]
        parts += ["renormalised"] * intervention.renormalise
    if isinstance(intervention, BiasRouter):
        added = [f"{layer}.{expert} {number:+g}" for layer, expert, number in intervention.bias]
        said = ("bias " + " ".join(added)) if len(added) <= MOST else f"bias of {len(added)} experts"
        forced = [("forced in", intervention.force_in), ("forced out", intervention.force_out)]
        parts[1:] = [said] * bool(added) + [_experts(word, pairs) for word, pairs in forced if pairs]
    for name in ("coefficient", "weight", "value"):
        if hasattr(intervention, name):
            parts.append(f"{name} {getattr(intervention, name):g}")
    return ", ".join([*parts, f"phase {intervention.phase}"] if intervention.phase != "all" else parts)


def _experts(word: str, pairs: Sequence[Expert]) -> str:
    """Name experts; many are counted."""
    if len(pairs) > MOST:
        return f"{word} {len(pairs)} in layers {ranges({layer for layer, _ in pairs})}"
    return f"{word} " + " ".join(f"{layer}.{expert}" for layer, expert in pairs)


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_range(intervention: Intervention, anatomy: Anatomy) -> None:
    what = f"{type(intervention).__name__} at {intervention.site}"
    if intervention.active_layers[-1] >= anatomy.layers:
        raise SteerError(
            f"{what} names layer {intervention.active_layers[-1]}",
            f"layers 0 to {anatomy.layers - 1} of this model",
            "Choose other layers",
        )
    if isinstance(intervention, ProjectOut) and intervention.heads:
        for layer, head in intervention.heads:
            if head >= anatomy.heads:
                raise SteerError(
                    f"{what} names head {head} of layer {layer}",
                    f"heads 0 to {anatomy.heads - 1} of this model",
                    "Choose other heads",
                )
    if isinstance(intervention, ScaleExperts | BiasRouter):
        expert_range.check(intervention, anatomy, what)
    elif not isinstance(intervention, Custom):
        expected = (anatomy.heads, anatomy.head_width) if intervention.site == "z" else (anatomy.hidden,)
        if intervention.direction.width != expected:
            raise SteerError(
                f"{what} has vectors of shape {intervention.direction.width}",
                f"{expected} in this model",
                "Make the direction from this model's own traces",
            )
