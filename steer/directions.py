"""Directions: one raw vector per layer at a site, with arithmetic and provenance.

A direction keeps the vectors as they were measured, un-normalised (`v` in DESIGN §2); whoever needs the unit vector
`v̂` takes it from `unit_vector`. At `z` a layer holds one vector per query head, shape (heads, head width), and
everything that is done to a vector (unit, random control, projection) is done per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer import artifacts
from steer.errors import SteerError
from steer.figures import Halves, direction_figure
from steer.identity import ModelIdentity, canonical, digest, mix
from steer.ranges import ranges
from steer.sites import site as site_named
from steer.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def unit_vector(vector: Float[Tensor, "*heads width"]) -> Float[Tensor, "*heads width"]:
    """Return `vector` with norm 1 along its last axis, computed and returned in float64.

    In float64 no square of a float32 number overflows or vanishes. The caller has excluded zero vectors.
    """
    wide = vector.double()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / norm


@dataclass(frozen=True, eq=False)
class Direction:
    """A raw vector per layer at a site.

    Attributes:
        vectors: float32 on the CPU, shape (layer, hidden), at `z` (layer, heads, head width); other floating
            dtypes are converted once, here.
        layers: numbers of the layers, increasing, counted from 0, one per row of `vectors`.
        site: where the vectors were measured; a direction may be used at another site of the same width.
        model: the model it was made from; None where unknown.
        provenance: keys of `steer.artifacts.GIVEN`; no part of equality.

    Raises:
        SteerError: unknown site, shapes or layers that do not fit, NaN or infinity.
    """

    vectors: Float[Tensor, "layer *width"]
    layers: tuple[int, ...]
    site: str
    model: ModelIdentity | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vectors = self.vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        _check_shape(vectors, self.layers, self.site)
        _check_finite(vectors, self.layers)

    def __getitem__(self, layer: int) -> Float[Tensor, "*width"]:
        """Return the raw vector of `layer`.

        Raises:
            SteerError: the direction has no vector for that layer.
        """
        if layer not in self.layers:
            raise SteerError(
                f"the direction has no vector for layer {layer}",
                f"one of layers {ranges(self.layers)}",
                "Choose among these layers, or collect that layer too",
            )
        return self.vectors[self.layers.index(layer)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and (self.fingerprint, self.model) == (other.fingerprint, other.model)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        made = f", model={self.model.name!r}" if self.model else ""
        return (
            f"Direction(site={self.site!r}, layers={ranges(self.layers)}, width={'x'.join(map(str, self.width))}{made})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{layer}</td><td>{norm:.4g}</td></tr>" for layer, norm in self.norms.items())
        return f"<p>Direction at <code>{self.site}</code></p><table><tr><th>layer</th><th>norm</th></tr>{rows}</table>"

    @property
    def width(self) -> tuple[int, ...]:
        """Shape of one layer's vector: (hidden,), at `z` (heads, head width)."""
        return tuple(self.vectors.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of site, layers and vectors; where they came from does not count."""
        return digest(
            [
                canonical({"site": self.site, "layers": self.layers}).encode(),
                artifacts.tensors_id({"vectors": self.vectors}).encode(),
            ]
        )

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean norm of every layer's raw vector, over all heads at `z`."""
        flat = torch.linalg.vector_norm(self.vectors.double().flatten(1), dim=1)
        return dict(zip(self.layers, flat.tolist(), strict=True))

    @property
    def halves(self) -> dict[int, Halves]:
        """Split-half cosine of the layers for which the provenance tells it; none for sums and random controls.

        It tells how well two halves of the questions agreed when the direction was measured; multiples and cuts keep it.
        """
        told = (self.provenance.get("options") or {}).get("split_half")
        names = ("layers", "mean", "lower", "upper")
        if not isinstance(told, Mapping) or not set(names) <= set(told) or self.provenance.get("parents"):
            return {}
        rows = zip(*(told[name] for name in names), strict=True)
        return {layer: Halves(*values) for layer, *values in rows if layer in self.layers}

    def frame(self) -> pandas.DataFrame:
        """Return one row per layer: layer, norm and, where it is known, split_half_cosine.

        Raises:
            SteerError: pandas is not installed.
        """
        halves = self.halves
        rows = [
            {"layer": layer, "norm": norm} | ({"split_half_cosine": halves[layer].mean} if layer in halves else {})
            for layer, norm in self.norms.items()
        ]
        return table(rows, ["layer", "norm", *(["split_half_cosine"] if halves else [])])

    def plot(self) -> Figure:
        """Draw the norm per layer and, where it is known, the split-half cosine with its interval."""
        return direction_figure(self.norms, self.halves, f"Direction at {self.site}")

    def only(self, layers: Iterable[int]) -> Direction:
        """Return the direction at some of its layers, in increasing order.

        Raises:
            SteerError: it has no vector for one of them.
        """
        wanted = tuple(sorted(set(layers)))
        return replace(
            self, vectors=torch.stack([self[layer] for layer in wanted]) if wanted else self.vectors[:0], layers=wanted
        )

    def __mul__(self, factor: float) -> Direction:
        """Return the direction times a finite number."""
        if not math.isfinite(factor):
            raise SteerError(f"a direction was multiplied by {factor}", "a finite number")
        return replace(self, vectors=self.vectors.double() * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def __add__(self, other: Direction) -> Direction:
        """Return the sum, layer by layer.

        Raises:
            SteerError: the two differ in site, layers, shape or model.
        """
        return self._with(other, 1.0)

    def __sub__(self, other: Direction) -> Direction:
        """Return the difference, layer by layer; errors as for a sum."""
        return self._with(other, -1.0)

    def _with(self, other: Direction, factor: float) -> Direction:
        model = self._shared_model(other)
        parents = [self.fingerprint, other.fingerprint]
        story = dict(self.provenance) | {
            "parents": parents,
            "convention": f"{'sum' if factor > 0 else 'difference'} of its parents",
        }
        return replace(
            self, vectors=self.vectors.double() + factor * other.vectors.double(), model=model, provenance=story
        )

    def _shared_model(self, other: Direction) -> ModelIdentity | None:
        if self.site != other.site:
            raise SteerError(
                f"the directions live at {self.site} and {other.site}", "one site", "Collect both at the same site"
            )
        if self.layers != other.layers:
            raise SteerError(
                f"the directions have layers {ranges(self.layers)} and {ranges(other.layers)}",
                "the same layers",
                "Cut both to common layers with d.only(layers)",
            )
        if self.width != other.width:
            raise SteerError(
                f"the directions have width {self.width} and {other.width}",
                "one width",
                "Make both from the same model",
            )
        return mix(self.model, other.model, "the directions")

    def unit(self) -> Direction:
        """Return the direction with norm 1 in every layer, at `z` in every head.

        Raises:
            SteerError: a vector is zero.
        """
        self.refuse_zero(self.layers, "has no unit vector")
        return replace(self, vectors=unit_vector(self.vectors))

    def refuse_zero(self, layers: Iterable[int], why: str) -> None:
        """Raise SteerError, naming layer (and head at `z`), where a vector of `layers` is zero."""
        for layer in layers:
            empty = ~self[layer].bool().any(-1)
            if bool(empty.any()):
                where = f"layer {layer}" + (f", head {int(empty.int().argmax())}" if empty.dim() else "")
                raise SteerError(
                    f"the direction is zero in {where} and {why}",
                    "a vector that is not zero",
                    "Leave that layer out with d.only(layers)",
                )

    def cosine(self, other: Direction) -> dict[int, float]:
        """Return the cosine with `other` per layer, over all heads at `z`; errors as for a sum.

        Raises:
            SteerError: a layer of either is zero.
        """
        self._shared_model(other)
        found = {}
        for layer in self.layers:
            a, b = self[layer].flatten(), other[layer].flatten()
            if not (a.any() and b.any()):
                raise SteerError(
                    f"a direction is zero in layer {layer} and has no angle",
                    "vectors that are not zero",
                    "Leave that layer out with d.only(layers)",
                )
            found[layer] = float(torch.dot(unit_vector(a), unit_vector(b)).clamp(-1.0, 1.0))
        return found

    def random_like(self, seed: int) -> Direction:
        """Return a random direction of equal norm in every layer (at `z` in every head): the control.

        Isotropic; the draw depends on the seed and the layer's number alone, so `only` commutes with it.
        """
        rows = [np.random.default_rng([seed, layer]).standard_normal(self.width) for layer in self.layers]
        drawn = unit_vector(torch.from_numpy(np.stack(rows)))
        vectors = drawn * torch.linalg.vector_norm(self.vectors.double(), dim=-1, keepdim=True)
        story = dict(self.provenance) | {
            "parents": [self.fingerprint],
            "seed": seed,
            "convention": "isotropic random control of its parent's norm",
        }
        return replace(self, vectors=vectors, provenance=story)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the direction as a `.safetensors` artifact and return its path; errors as `steer.artifacts.write`."""
        story = {**self.provenance, **describe(self)}
        artifacts.write(path, "direction", {"vectors": self.vectors}, story, overwrite)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            SteerError: the file is damaged, of another kind or version, or its contents do not fit together.
        """
        stored = artifacts.read(path, "direction")
        return from_stored(stored.tensors.get("vectors"), stored.provenance, str(path))


def describe(direction: Direction) -> dict[str, Any]:
    """Return what a file needs beside the vectors: model, site and content."""
    model = None if direction.model is None else direction.model.to_dict()
    return {"model": model, "site": direction.site, "content": {"layers": list(direction.layers)}}


def from_stored(vectors: Tensor | None, block: Mapping[str, Any], where: str) -> Direction:
    """Rebuild a direction from a tensor and its block of provenance.

    Raises:
        SteerError: tensor or layers are missing, or do not fit together.
    """
    content = block.get("content")
    layers = content.get("layers") if isinstance(content, Mapping) and set(content) == {"layers"} else None
    if vectors is None or not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise SteerError(
            f"{where} lacks the vectors or the layers of a direction",
            "tensor `vectors` and a list of layers",
            "Make the file again",
        )
    model = None if block.get("model") is None else ModelIdentity.from_dict(block["model"])
    story = {key: block[key] for key in artifacts.GIVEN if key in block and key not in ("model", "site", "content")}
    return Direction(vectors, tuple(layers), str(block.get("site")), model, story)


def _check_shape(vectors: Tensor, layers: tuple[int, ...], name: str) -> None:
    place = site_named(name)
    if not place.has_vectors:
        why = "where experts are chosen" if place.routing else "which exists in no tensor"
        raise SteerError(
            f"a direction was given for {name}, {why}",
            "a site that can be read",
            "Use attn_raw, or resid_mid as ThinkEdit does",
        )
    axes = "(layer, heads, head width)" if place.per_head else "(layer, hidden)"
    if vectors.dim() != (3 if place.per_head else 2) or 0 in vectors.shape:
        raise SteerError(
            f"the direction at {name} has shape {tuple(vectors.shape)}",
            f"{axes}, none of them 0",
            "Give one vector per layer",
        )
    if len(layers) != vectors.shape[0] or list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise SteerError(
            f"the direction has {vectors.shape[0]} vectors for layers {list(layers)}",
            "one per layer, layers increasing from 0 on, none twice",
            "Sort the layers with their vectors",
        )


def _check_finite(vectors: Tensor, layers: tuple[int, ...]) -> None:
    bad = [layer for layer, row in zip(layers, vectors, strict=True) if not bool(torch.isfinite(row).all())]
    if bad:
        raise SteerError(
            f"the direction holds NaN or infinity in layers {ranges(bad)}",
            "finite numbers",
            "Collect it again in float32; look for traces on which the model overflows",
        )
