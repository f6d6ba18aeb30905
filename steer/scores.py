"""Head scores: how strongly each attention head writes towards something, with its uncertainty.

For ThinkEdit (arXiv 2503.22048, §4) the score of a head is the mean, over short thoughts, of what the head writes
along minus the unit direction of long thoughts; the largest scores belong to the heads that make thoughts short.
This file holds the values and their choice; `probes.heads` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer import artifacts
from steer.errors import SteerError
from steer.identity import ModelIdentity, digest
from steer.ranked import check_count, drawn, html
from steer.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Head = tuple[int, int]
_OPTIONAL = ("lower", "upper", "p_value")


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score per layer and head.

    Attributes:
        values: float32, shape (layer, head); rows count from layer 0. NaN marks a head that was not scored.
        lower, upper: ends of an interval around each score; None where none was computed.
        p_value: chance of a score as large under the permutation null, in [0, 1]; None where none was computed.
        stability: agreement of the scores of two halves of the data (Spearman), in [-1, 1]; None where not computed.
        model: the model they were made from.
        provenance: keys of `steer.artifacts.GIVEN`.

    Raises:
        SteerError: shapes that differ, infinities, an interval that is upside down, or no scored head.
    """

    values: Float[Tensor, "layer head"]
    lower: Float[Tensor, "layer head"] | None = None
    upper: Float[Tensor, "layer head"] | None = None
    p_value: Float[Tensor, "layer head"] | None = None
    stability: float | None = None
    model: ModelIdentity | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("values", *_OPTIONAL):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, given.detach().to("cpu", torch.float32, copy=True).contiguous())
        _check(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadScores) and (self.fingerprint, self.model) == (other.fingerprint, other.model)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        layers, heads = self.values.shape
        best = ", ".join(
            f"({layer}, {head}) {self[layer, head]:.3g}" for layer, head in self.top(min(3, len(self.ranked)))
        )
        return f"HeadScores({layers} layers x {heads} heads; best {best})"

    def __getitem__(self, head: Head) -> float:
        """Return the score of (layer, head)."""
        return float(self.values[head])

    @property
    def fingerprint(self) -> str:
        """Hash of the numbers."""
        return digest([artifacts.tensors_id(self._tensors()).encode(), repr(self.stability).encode()])

    @property
    def ranked(self) -> tuple[Head, ...]:
        """Every scored head, best first; of equal scores the earlier layer and head first."""
        found = [(layer, head) for layer, head in torch.isfinite(self.values).nonzero().tolist()]
        return tuple(sorted(found, key=lambda place: (-self[place], place)))

    def top(self, n: int) -> tuple[Head, ...]:
        """Return the n heads with the largest scores, best first.

        Raises:
            SteerError: n is not between 1 and the number of scored heads.
        """
        return self.ranked[: self._count(n)]

    def bottom(self, n: int) -> tuple[Head, ...]:
        """Return the n heads with the smallest scores, smallest first; errors as `top`."""
        return self.ranked[::-1][: self._count(n)]

    def share(self, share: float) -> tuple[Head, ...]:
        """Return the best `share` of all heads of the model, at least one head.

        The number is share × layers × heads rounded to the nearest integer, halves up: 0.04 of 336 is 13.

        Args:
            share: in (0, 1]; the paper speaks of about 0.04.

        Raises:
            SteerError: the share is outside (0, 1], or more than the scored heads.
        """
        if not 0 < share <= 1:
            raise SteerError(
                f"the share of heads is {share}", "a number above 0 and at most 1", "0.04 takes four heads of a hundred"
            )
        return self.top(max(1, math.floor(share * self.values.numel() + 0.5)))

    def random(self, n: int, seed: int, exclude: Iterable[Head] = ()) -> tuple[Head, ...]:
        """Return n scored heads drawn evenly without the excluded ones, sorted: the control.

        Raises:
            SteerError: fewer than n heads are left.
        """
        return drawn(self.ranked, n, seed, exclude, "heads")

    def frame(self) -> pandas.DataFrame:
        """Return one row per scored head, best first: layer, head, score and what else is known.

        Raises:
            SteerError: pandas is not installed.
        """
        rows = self.rows()
        return table(rows, list(rows[0]))

    def rows(self) -> list[dict[str, int | float]]:
        """Return the same table as plain data."""
        known = {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        return [
            {"layer": layer, "head": head, "score": self[layer, head]}
            | {name: float(values[layer, head]) for name, values in known.items()}
            for layer, head in self.ranked
        ]

    def _repr_html_(self) -> str:
        return html(self.rows(), "heads")

    def plot(self, heads: Iterable[Head] = (), title: str = "Head scores") -> Figure:
        """Draw the map layer × head, blue below zero and red above, with `heads` outlined.

        Raises:
            SteerError: an outlined head does not exist.
        """
        from steer.head_map import draw

        return draw(self.values.numpy(), [self._known(head) for head in heads], title)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the scores as a `.safetensors` artifact and return its path; errors as `steer.artifacts.write`."""
        model = None if self.model is None else self.model.to_dict()
        story = {**self.provenance, "model": model, "content": {"stability": self.stability}}
        artifacts.write(path, "scores", self._tensors(), story, overwrite)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what `save` wrote.

        Raises:
            SteerError: the file is damaged, of another kind or version, or its contents do not fit together.
        """
        stored = artifacts.read(path, "scores")
        content = stored.provenance["content"]
        if (
            "values" not in stored.tensors
            or not set(stored.tensors) <= {"values", *_OPTIONAL}
            or not isinstance(content, Mapping)
            or set(content) != {"stability"}
        ):
            raise SteerError(
                f"{path} does not hold head scores",
                f"tensors among values, {', '.join(_OPTIONAL)} and a stability",
                "Make the file again",
            )
        story = {key: stored.provenance[key] for key in artifacts.GIVEN if key not in ("model", "content")}
        return cls(**stored.tensors, stability=content["stability"], model=stored.model, provenance=story)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name in ("values", *_OPTIONAL) if (value := getattr(self, name)) is not None}

    def _count(self, n: int) -> int:
        return check_count(n, len(self.ranked), "heads")

    def _known(self, place: Head) -> Head:
        layer, head = place
        layers, heads = self.values.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise SteerError(
                f"there is no head {head} in layer {layer}", f"layers 0 to {layers - 1}, heads 0 to {heads - 1}"
            )
        return place


def _check(scores: HeadScores) -> None:
    values = scores.values
    if values.dim() != 2 or not bool(torch.isfinite(values).any()) or bool(torch.isinf(values).any()):
        raise SteerError(
            f"the head scores have shape {tuple(values.shape)}, or are infinite or all missing",
            "finite scores of shape (layer, head)",
            "Score at least one head, in float32",
        )
    scored = torch.isfinite(values)
    for name in _OPTIONAL:
        other = getattr(scores, name)
        if other is not None and (other.shape != values.shape or not bool(torch.isfinite(other[scored]).all())):
            raise SteerError(
                f"{name} of the head scores has shape {tuple(other.shape)} or holds NaN",
                f"a number for every score, shape {tuple(values.shape)}",
            )
    if (scores.lower is None) != (scores.upper is None) or (
        scores.lower is not None and scores.upper is not None and bool((scores.lower > scores.upper)[scored].any())
    ):
        raise SteerError(
            "the interval of the head scores has one end only, or is upside down", "lower <= upper for every head"
        )
    if scores.p_value is not None and not bool(((scores.p_value >= 0) & (scores.p_value <= 1))[scored].all()):
        raise SteerError("a p value lies outside 0 to 1", "chances")
    if scores.stability is not None and not -1 <= scores.stability <= 1:
        raise SteerError(f"the stability is {scores.stability}", "a rank correlation, -1 to 1")
