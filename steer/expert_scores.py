"""Expert scores: how closely an expert's being chosen goes with marker tokens, with counts and uncertainty.

RICE (arXiv 2505.14681) ranks the experts of all layers by normalised pointwise mutual information with the tokens that
open, close and turn a thought. This file holds the values and their choice; `probes.experts` computes them. An expert is
a pair (layer, expert): the model's layer number, and the row of the router's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer import artifacts
from steer.errors import SteerError
from steer.expert_interventions import Expert
from steer.identity import ModelIdentity, canonical, digest
from steer.ranked import check_count, drawn, html
from steer.scored_markers import ScoredMarker, formula
from steer.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

KIND = "expert_scores"
_INTERVAL, _CHANCES = ("lower", "upper"), ("p_value", "q_value")
_OPTIONAL = (*_INTERVAL, *_CHANCES)
_CONTENT = {"layers": list, "method": str, "tokens": int, "markers": list}


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """A score per layer and expert, and the counts that it was made of.

    Attributes:
        values: float32, shape (layer, expert). NaN marks an expert that no token chose, or that was not scored.
        layers: the model's layer number of each row, increasing.
        chosen: K, int64 (layer, expert): tokens that choose the expert.
        together: k, int64 (marker, layer, expert): tokens that are the marker and choose the expert.
        tokens: T, all tokens that were counted.
        markers: in the order of `together`.
        method: one of `probes.experts.METHODS`.
        lower, upper: float32, ends of an interval around each score; NaN where no resample has a score.
        p_value: float64, chance of a score as large or larger where markers stand anywhere in their trace.
        q_value: float64, p_value corrected for the number of experts: share of false discoveries.
        model: the model they were made from.
        provenance: keys of `steer.artifacts.GIVEN`.

    Raises:
        SteerError: shapes that differ, counts that cannot be, infinities, an interval that is upside down, chances
            outside 0 to 1, or no scored expert.
    """

    values: Float[Tensor, "layer expert"]
    layers: tuple[int, ...]
    chosen: Int[Tensor, "layer expert"]
    together: Int[Tensor, "marker layer expert"]
    tokens: int
    markers: tuple[ScoredMarker, ...]
    method: str
    lower: Float[Tensor, "layer expert"] | None = None
    upper: Float[Tensor, "layer expert"] | None = None
    p_value: Float[Tensor, "layer expert"] | None = None
    q_value: Float[Tensor, "layer expert"] | None = None
    model: ModelIdentity | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtypes = dict.fromkeys(("values", *_INTERVAL), torch.float32) | dict.fromkeys(_CHANCES, torch.float64)
        for name, dtype in {**dtypes, "chosen": torch.int64, "together": torch.int64}.items():
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, given.detach().to("cpu", dtype, copy=True).contiguous())
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        object.__setattr__(self, "markers", tuple(self.markers))
        _check(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertScores) and (self.fingerprint, self.model) == (other.fingerprint, other.model)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        best = ", ".join(f"({layer}, {expert}) {self[layer, expert]:.3g}" for layer, expert in self.ranked[:3])
        layers, experts = self.values.shape
        return f"ExpertScores({self.method} of {self.formula}; {layers} layers x {experts} experts; best {best})"

    def __getitem__(self, expert: Expert) -> float:
        """Return the score of (layer, expert); errors as `place`."""
        return float(self.values[self.place(expert)])

    def place(self, expert: Expert) -> tuple[int, int]:
        """Return where (layer, expert) stands in the tensors.

        Raises:
            SteerError: no such layer or expert was scored.
        """
        layer, number = expert
        if layer not in self.layers or not 0 <= number < self.values.shape[1]:
            raise SteerError(
                f"there is no expert {number} in layer {layer} of these scores",
                f"a layer of {_listed(self.layers)}, an expert of 0 to {self.values.shape[1] - 1}",
            )
        return self.layers.index(layer), number

    @property
    def fingerprint(self) -> str:
        """Hash of the numbers and of what they count."""
        return digest([artifacts.tensors_id(self._tensors()).encode(), canonical(self._content()).encode()])

    @property
    def formula(self) -> str:
        """The signed sum in words, such as `<think> - </think>`."""
        return formula((marker.text, marker.sign) for marker in self.markers)

    @cached_property
    def ranked(self) -> tuple[Expert, ...]:
        """Every scored expert, best first; of equal scores the earlier layer and expert first."""
        scores = self.values.flatten().numpy()
        order = np.argsort(-scores, kind="stable")  # NaN goes last.
        width = self.values.shape[1]
        found = order[: int(np.isfinite(scores).sum())].tolist()
        return tuple((self.layers[place // width], place % width) for place in found)

    def top(self, n: int) -> tuple[Expert, ...]:
        """Return the n experts with the largest scores, best first; see `ties`.

        Raises:
            SteerError: n is not between 1 and the number of scored experts.
        """
        return self.ranked[: check_count(n, len(self.ranked), "experts")]

    def bottom(self, n: int) -> tuple[Expert, ...]:
        """Return the n experts with the smallest scores, smallest first; errors as `top`."""
        return self.ranked[::-1][: check_count(n, len(self.ranked), "experts")]

    def ties(self, n: int) -> tuple[Expert, ...]:
        """Return the experts outside `top(n)` with exactly the score of its last one; errors as `top`.

        Where there are any, which expert is the n-th was decided by its number and by nothing else.
        """
        last = self[self.top(n)[-1]]
        return tuple(expert for expert in self.ranked[n:] if self[expert] == last)

    def random(self, n: int, seed: int, exclude: Iterable[Expert] = ()) -> tuple[Expert, ...]:
        """Return n scored experts drawn evenly without the excluded ones, sorted: a control.

        Raises:
            SteerError: fewer than n experts are left.
        """
        return drawn(self.ranked, n, seed, exclude, "experts")

    def matched(self, experts: Sequence[Expert], seed: int, exclude: Iterable[Expert] = ()) -> tuple[Expert, ...]:
        """Return for each expert another one of its layer that is chosen as often as possible as it: a control.

        In the order given, each takes the one with the nearest K that is left, equally near ones by lot; neither the
        experts themselves nor excluded ones are taken.

        Raises:
            SteerError: an expert that was not scored, or a layer with too few others.
        """
        taken = {*experts, *exclude}
        lot = np.random.default_rng(seed)
        found: list[Expert] = []
        for layer, number in experts:
            row, column = self.place((layer, number))
            left = [other for other in self.ranked if other[0] == layer and other not in taken]
            if not left:
                raise SteerError(
                    f"layer {layer} has no expert left that could stand beside expert {number}",
                    "as many others in each layer as are to be matched",
                    "Match fewer, or exclude fewer",
                )
            counts = self.chosen[row].tolist()
            lots = lot.permutation(len(left)).tolist()
            nearest = min(range(len(left)), key=lambda at: (abs(counts[left[at][1]] - counts[column]), lots[at]))
            found.append(left[nearest])
            taken.add(left[nearest])
        return tuple(found)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per scored expert, best first.

        Layer, expert, score, what is known of `lower`, `upper`, `p_value`, `q_value`, then `share` = K / T and for each
        marker `share of <text>` = k / M.
        """
        known = {name: values.tolist() for name in _OPTIONAL if (values := getattr(self, name)) is not None}
        scores, chosen, together = self.values.tolist(), self.chosen.tolist(), self.together.tolist()
        found = []
        for layer, expert in self.ranked:
            row = self.layers.index(layer)
            told: dict[str, Any] = {"layer": layer, "expert": expert, "score": scores[row][expert]}
            told |= {name: _known(values[row][expert]) for name, values in known.items()}
            told["share"] = chosen[row][expert] / self.tokens
            for marker, counts in zip(self.markers, together, strict=True):
                told[f"share of {marker.text}"] = counts[row][expert] / marker.marked
            found.append(told)
        return found

    def frame(self) -> pandas.DataFrame:
        """Return `rows` as a pandas table.

        Raises:
            SteerError: pandas is not installed.
        """
        rows = self.rows()
        return table(rows, list(rows[0]))

    def _repr_html_(self) -> str:
        return f"<p>{self.method} of {self.formula.replace('<', '&lt;')}</p>" + html(self.rows(), "experts")

    def plot(self, experts: Iterable[Expert] = (), title: str | None = None) -> Figure:
        """Draw the map layer × expert, blue below zero and red above, with rings around `experts`.

        Raises:
            SteerError: a ringed expert does not exist.
        """
        from steer.expert_figures import score_map

        places = [self.place(expert) for expert in experts]
        return score_map(self.values.numpy(), self.layers, places, title or f"{self.method} of {self.formula}")

    def volcano(self, experts: Iterable[Expert] = (), level: float = 0.05, title: str | None = None) -> Figure:
        """Draw score against -log10 of the p-value, with the line above which q is at most `level`.

        Args:
            experts: written beside their points.
            level: of the share of false discoveries.
            title: above the picture.

        Raises:
            SteerError: the scores have no p-values, or a named expert does not exist.
        """
        from steer.expert_figures import volcano

        if self.p_value is None or self.q_value is None:
            raise SteerError("these expert scores have no p-values", "scores made with their null", "Make them again with null=True")  # fmt: skip
        places = {self.place(expert): f"({expert[0]}, {expert[1]})" for expert in experts}
        shown = (self.values.numpy(), self.p_value.numpy(), self.q_value.numpy())
        return volcano(*shown, places, level, title or f"{self.method} of {self.formula}")

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the scores as a `.safetensors` artifact and return its path; errors as `steer.artifacts.write`."""
        model = None if self.model is None else self.model.to_dict()
        story = {**self.provenance, "model": model, "content": self._content()}
        artifacts.write(path, KIND, self._tensors(), story, overwrite)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Read what `save` wrote.

        Raises:
            SteerError: the file is damaged, of another kind or version, or its contents do not fit together.
        """
        stored = artifacts.read(path, KIND)
        content, needed = stored.provenance["content"], {"values", "chosen", "together"}
        if not needed <= set(stored.tensors) <= {*needed, *_OPTIONAL} or not _is_content(content):
            raise SteerError(
                f"{path} does not hold expert scores",
                f"the tensors {', '.join(sorted(needed))}, some of {', '.join(_OPTIONAL)}, and {', '.join(_CONTENT)}",
                "Make the file again",
            )
        story = {key: stored.provenance[key] for key in artifacts.GIVEN if key not in ("model", "content")}
        return cls(
            **stored.tensors,
            layers=tuple(content["layers"]),
            tokens=content["tokens"],
            markers=tuple(ScoredMarker.from_dict(marker) for marker in content["markers"]),
            method=content["method"],
            model=stored.model,
            provenance=story,
        )

    def _content(self) -> dict[str, Any]:
        markers = [asdict(marker) for marker in self.markers]
        return {"layers": list(self.layers), "method": self.method, "tokens": self.tokens, "markers": markers}

    def _tensors(self) -> dict[str, Tensor]:
        names = ("values", "chosen", "together", *_OPTIONAL)
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _is_content(content: object) -> bool:
    """Whether a file says beside its tensors what `save` writes; a marker checks itself."""
    if not isinstance(content, Mapping) or {key: type(value) for key, value in content.items()} != _CONTENT:
        return False
    numbers, markers = content["layers"], content["markers"]
    return all(type(each) is int for each in numbers) and all(isinstance(each, Mapping) for each in markers)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) < 9 else f"{layers[0]} to {layers[-1]}"


def _check(scores: ExpertScores) -> None:
    values, layers = scores.values, scores.layers
    scored = torch.isfinite(values)
    if values.dim() != 2 or not bool(scored.any()) or bool(torch.isinf(values).any()):
        raise SteerError(
            f"the expert scores have shape {tuple(values.shape)}, or are infinite or all missing",
            "finite scores of shape (layer, expert)",
            "Score at least one expert",
        )
    if len(layers) != len(values) or any(a >= b for a, b in zip((-1, *layers), layers, strict=False)):
        raise SteerError(f"the layers {list(layers)} were given for {len(values)} rows of scores", "one number per row, increasing")  # fmt: skip
    shapes = {"chosen": scores.chosen, **{name: getattr(scores, name) for name in _OPTIONAL}}
    for name, other in shapes.items():
        if other is not None and other.shape != values.shape:
            raise SteerError(f"{name} of the expert scores has shape {tuple(other.shape)}", f"{tuple(values.shape)}")
    _check_counts(scores)
    if (scores.lower is None) != (scores.upper is None) or (
        scores.lower is not None and scores.upper is not None and bool((scores.lower > scores.upper)[scored].any())
    ):
        raise SteerError(
            "the interval of the expert scores has one end only, or is upside down", "lower <= upper for every expert"
        )
    for name in _CHANCES:
        chances = getattr(scores, name)
        if chances is not None and not bool(((chances >= 0) & (chances <= 1))[scored].all()):
            raise SteerError(f"a {name} of the expert scores lies outside 0 to 1", "chances")


def _check_counts(scores: ExpertScores) -> None:
    markers, chosen, together = scores.markers, scores.chosen, scores.together
    if tuple(together.shape) != (len(markers), *chosen.shape):
        raise SteerError(
            f"the counts with markers have shape {tuple(together.shape)}",
            f"{(len(markers), *chosen.shape)}, one (layer, expert) per marker",
        )
    marked = torch.tensor([marker.marked for marker in markers], dtype=torch.int64)[:, None, None]
    possible = bool((chosen >= 0).all()) and bool((chosen <= scores.tokens).all())
    if not possible or not bool(((together >= 0) & (together <= chosen) & (together <= marked)).all()):
        raise SteerError(
            "the counts of the expert scores cannot be",
            "0 <= tokens that are the marker and choose the expert <= tokens of either, <= all tokens",
            "Count again",
        )
    wrong = [marker.text for marker in markers if not math.isfinite(marker.sign) or not marker.sign or not marker.marked]  # fmt: skip
    if wrong:
        raise SteerError(f"the marker {wrong[0]!r} has no weight or stands nowhere", "a weight other than 0, and a token")  # fmt: skip
