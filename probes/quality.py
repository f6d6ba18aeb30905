"""Whether a direction can be trusted: how stable it is, and what it tells on questions it was not made from.

Stability is in `probes.stability`, held-out areas are in `probes.held_out`. Beside the area of the direction stand those
of what is to be had without it:

* `length`: the number of thinking tokens alone. A length direction cannot beat it over whole thoughts, since length is
  what it is asked for; any other direction that does not beat it may know nothing but the length.
* `prompt`: a direction of the same two sides made and read at the last prompt token, before anything was thought (where
  the summary has that span at the same site).

At equal prefixes (`prefix=N`): the direction is made from whole thoughts and read from the mean of the first N positions
of the span, among traces that all have at least N; the sides are chosen anew among those. There the number of tokens read
is N for all and its area 1/2, so that what is above it was read in the activations. This comparison is ours.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probes import statistics
from probes.collect.means import quantity
from probes.held_out import FOLDS, Fold, Scores, beyond, count_scores, folds_of, scores_of, within
from probes.kinds import Method
from probes.lengths import Choice, choose
from probes.recipes import Labels, Recipe, recipe_of
from probes.stability import SplitHalf, cone_of, split_half_of
from probes.strata import Sides, items_of, rows_of
from steer.directions import Direction
from steer.errors import SteerError
from steer.intervals import RESAMPLES, Interval
from steer.ranges import ranges
from steer.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from probes.collect.summary import Summary

PROMPT = "last_prompt_token"


@dataclass(frozen=True)
class HeldOut:
    """Held-out areas of one way to read the traces.

    Attributes:
        read: what was read.
        positive, negative: traces judged.
        layers: area at every layer; the best of them is the best of many, so that `chosen` is the one to quote.
        chosen: area with the layer chosen on other questions.
        picked: the layers so chosen, one per fold.
        baselines: what is to be had without the direction -> its area.
        beyond: the same -> `chosen` minus that area, on the same drawn questions.
    """

    read: str
    positive: int
    negative: int
    layers: tuple[Interval, ...]
    chosen: Interval
    picked: tuple[int, ...]
    baselines: Mapping[str, Interval]
    beyond: Mapping[str, Interval]

    def sentence(self) -> str:
        """Say it in one line."""
        parts = [f"{name} alone {_said(area)}, difference {_said(self.beyond[name], True)}" for name, area in self.baselines.items()]  # fmt: skip
        layers = ", ".join(map(str, sorted(set(self.picked))))
        return f"Held-out area, {self.read}: {_said(self.chosen)} ({self.positive} against {self.negative} traces, layer chosen on other questions: {layers}); {'; '.join(parts)}."


@dataclass(frozen=True)
class Quality:
    """What is known of a direction.

    Attributes:
        direction: it.
        similar: cosine between its layers, (layer, layer).
        halves: agreement of two halves of the questions; None with too few questions.
        cone: angle in degrees that holds 95 % of the bootstrap's directions, per layer.
        whole: read over the span that it was made from; None with too few questions.
        prefix: read over the first positions alone; None where not asked for.
        remarks: what could not be told, and why.
    """

    direction: Direction
    similar: tuple[tuple[float, ...], ...]
    halves: SplitHalf | None
    cone: tuple[float, ...]
    whole: HeldOut | None
    prefix: HeldOut | None = None
    remarks: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Return what is to be said beside the table."""
        return [held.sentence() for held in (self.whole, self.prefix) if held is not None] + list(self.remarks)

    def rows(self) -> list[dict[str, float | None]]:
        """Return one mapping per layer: norm, cosine with the next layer, stability, areas with their intervals."""
        found: list[dict[str, float | None]] = []
        for place, (layer, norm) in enumerate(self.direction.norms.items()):
            row: dict[str, float | None] = {"layer": layer, "norm": norm}
            row["cosine_with_next"] = self.similar[place][place + 1] if place + 1 < len(self.similar) else None
            row["split_half_cosine"] = None if self.halves is None else self.halves[layer]
            row["cone_degrees"] = self.cone[place]
            for name, held in (("auc", self.whole), ("prefix_auc", self.prefix)):
                if held is not None:
                    area = held.layers[place]
                    row |= {name: area.value, f"{name}_low": area.low, f"{name}_high": area.high}
            found.append(row)
        return found

    def frame(self) -> DataFrame:
        """Return `rows` as a pandas table."""
        rows = self.rows()
        return table(rows, list(rows[0]))

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences())
        return f"{said}<table><tr>{head}</tr>{body}</table>"

    def plot(self) -> Figure:
        """Draw norm, split-half cosine and held-out area per layer."""
        from probes.quality_figure import quality_figure

        return quality_figure(self)


def quality(
    direction: Direction,
    summary: Summary,
    *,
    positive: Labels | None = None,
    prefix: int | None = None,
    folds: int = FOLDS,
    draws: int | None = None,
    splits: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Quality:
    """Judge a direction on the summary it was made from, or on one of other traces.

    Everything is made anew by the direction's recipe from halves, resamples and folds of the questions; the direction's
    own numbers are only shown.

    Args:
        direction: of `length_direction`, `contrast_direction` or `efficiency_direction`.
        summary: one row per trace.
        positive: the labels again, where they were given by hand.
        prefix: also read the first so many positions; needs means of segments of that length (see `SegmentMeans`).
        folds: of the questions, for held-out areas.
        draws: of the bootstrap cone; None: 200, and 10 for kinds that are fitted, each of which is a fit per layer.
        splits: for the split-half cosine; None: 20, and 4 for kinds that are fitted.
        resamples: for the intervals of areas.
        seed: of everything drawn.

    Raises:
        SteerError: the direction does not tell its recipe, the summary is of another model, or lacks what is read.
    """
    recipe = recipe_of(direction, summary, positive)
    if direction.layers != summary.kept(recipe.name).layers:
        raise SteerError(
            f"the direction has layers {ranges(direction.layers)} and the summary {ranges(summary.kept(recipe.name).layers or ())}",
            "the same layers",
            "Judge the direction before it is cut, or collect its layers",
        )
    vectors = direction.vectors.double()
    flat = vectors.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
    judge = _Judge(summary, recipe, folds, {"resamples": resamples, "seed": seed})
    whole = judge.whole()
    remarks = [] if whole else ["Too few questions have both kinds of traces for held-out areas."]
    first = None if prefix is None else judge.prefix(prefix)
    if prefix is not None and first is None:
        remarks.append(f"Too few questions have both kinds of traces that reach {prefix} positions.")
    return Quality(
        direction,
        tuple(tuple(row) for row in (unit @ unit.T).tolist()),
        split_half_of(summary, recipe.name, recipe.sides, recipe.method, splits, seed),
        cone_of(summary, recipe.name, recipe.sides, recipe.method, vectors, draws=draws, seed=seed),
        whole,
        first,
        tuple(remarks),
    )


@dataclass(frozen=True)
class _Judge:
    """Everything that held-out areas of one direction share."""

    summary: Summary
    recipe: Recipe
    folds: int
    options: Mapping[str, int]

    def whole(self) -> HeldOut | None:
        """Read over the span that the direction was made from."""
        sides = self.recipe.sides
        folds = folds_of(self.summary, sides, sides, self.recipe.method, self.folds, self.options["seed"])
        if not folds:
            return None
        scores = scores_of(self.summary, self.recipe.name, folds, self.recipe.method)
        lengths = count_scores([row.length for row in self.summary.rows], folds)
        baselines = {"length": lengths} | self.prompt(folds)
        return self.compared(f"read over {self.recipe.span}", sides, scores, baselines)

    def prefix(self, count: int) -> HeldOut | None:
        """Read over the first `count` positions, among traces that have as many.

        Raises:
            SteerError: the summary has no means of such segments, or no two sides reach so far.
        """
        name = f"{self.recipe.name}/{count}"
        if name not in self.summary.quantities:
            raise SteerError(
                f"the summary has no {name}, means of segments of {count} positions",
                f"one of {', '.join(self.summary.quantities)}",
                f'Collect with SegmentMeans(("{self.recipe.site}",), span="{self.recipe.span}", every={count})',
            )
        reach = [row.positions[self.recipe.span] >= count for row in self.summary.rows]
        sides = self._sides_among(reach)
        folds = folds_of(self.summary, self.recipe.sides, sides, self.recipe.method, self.folds, self.options["seed"])
        if not folds:
            return None
        scores = scores_of(self.summary, self.recipe.name, folds, self.recipe.method, read=name)
        tokens = np.where(np.isfinite(scores.chosen), float(count), np.nan)
        baselines = {"tokens read": tokens} | self.prompt(folds, sides)
        return self.compared(f"read over the first {count} positions of {self.recipe.span}", sides, scores, baselines)

    def _sides_among(self, reach: list[bool]) -> Sides | Choice:
        sides = self.recipe.sides
        if isinstance(sides, Choice):
            return choose(self.summary.rows, reach, sides.rule)
        return statistics.restricted(sides, reach)

    def prompt(self, folds: list[Fold], sides: Sides | Choice | None = None) -> dict[str, NDArray[np.float64]]:
        """Scores of a direction of the same sides at the last prompt token, where the summary has it."""
        name = quantity(self.recipe.site, PROMPT)
        if name not in self.summary.quantities or self.recipe.span == PROMPT:
            return {}
        if sides is not None:  # Made from the traces that are judged, since before the thought no other knows less.
            fits = [statistics.restricted(sides, self._inside(fold)) for fold in folds]
            pairs = zip(folds, fits, strict=True)
            folds = [Fold(fit, fold.choose, fold.report) for fold, fit in pairs if fit.strata]
        return {"prompt": scores_of(self.summary, name, folds, Method()).chosen} if folds else {}

    def _inside(self, fold: Fold) -> list[bool]:
        items = items_of(self.summary)
        held = {items[row] for row in fold.report} | {
            items[row] for side in rows_of(fold.choose.strata) for row in side
        }
        return [item not in held for item in items]

    def compared(
        self, read: str, sides: Sides | Choice, scores: Scores, baselines: Mapping[str, NDArray[np.float64]]
    ) -> HeldOut:
        """Areas of the scores and of what they are compared with."""
        items, strata = items_of(self.summary), sides.strata
        judged = np.isfinite(scores.chosen)
        negative, positive = (int(judged[list(side)].sum()) for side in rows_of(strata))
        layers = self.summary.kept(self.recipe.name).layers or ()
        return HeldOut(
            read,
            positive,
            negative,
            tuple(within(each, strata, items, **self.options) for each in scores.layers),
            within(scores.chosen, strata, items, **self.options),
            tuple(layers[place] for place in scores.picked),
            {name: within(each, strata, items, **self.options) for name, each in baselines.items()},
            {name: beyond(scores.chosen, each, strata, items, **self.options) for name, each in baselines.items()},
        )


def _said(found: Interval, signed: bool = False) -> str:
    if found.value is None:
        return "unknown"
    form = "{:+.3f}" if signed else "{:.3f}"
    ends = "" if found.low is None or found.high is None else f" [{form.format(found.low)}, {form.format(found.high)}]"
    return form.format(found.value) + ends


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
