"""The thinking-length direction: how the residual stream of long thoughts differs from that of short ones.

arXiv 2503.22048 (ThinkEdit), Eq. 1: per layer, v = mean over long traces of m_i - mean over short traces of m_i, where m_i
is the mean over a trace's positions (those that predict its thinking tokens) of the residual stream after attention. Each
trace weighs the same, whatever its length; v is kept raw. Its sign: adding v makes thoughts longer.

Ours, beyond the paper: percentiles, comparison within groups (`probes.lengths`, `probes.statistics`), and the split-half
stability that stands in every direction's provenance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from probes import statistics
from probes.collect.means import quantity
from probes.collect.summary import Summary
from probes.lengths import ABOVE, BELOW, Choice, LengthRule, Stratum, choose
from steer import artifacts
from steer.directions import Direction
from steer.errors import SteerError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONVENTION = "mean(long) - mean(short), raw"
SPLITS = 20


@dataclass(frozen=True)
class SplitHalf:
    """How well two halves of the questions agree on a direction, per layer.

    Attributes:
        layers: numbers.
        mean, lower, upper: of the cosine over the splits; the ends are the 5th and 95th percentile.
        splits: how many splits had short and long traces in both halves.
    """

    layers: tuple[int, ...]
    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    splits: int

    def __getitem__(self, layer: int) -> float:
        """Return the mean cosine of a layer."""
        return self.mean[self.layers.index(layer)]

    def plot(self) -> Figure:
        """Draw the cosine per layer with its interval."""
        from probes.plots import split_half_figure

        return split_half_figure(self)


def length_direction(
    summary: Summary,
    *,
    site: str = "resid_mid",
    span: str = "predicts_thinking",
    below: int = BELOW,
    above: int = ABOVE,
    percentiles: tuple[float, float] | None = None,
    by_group: bool = False,
    include_unclosed: bool = False,
    splits: int = SPLITS,
    seed: int = 0,
) -> Direction:
    """Return mean(long) - mean(short) per layer, computed in float64.

    Args:
        summary: of traces; of groups only where these are called "short" and "long".
        site: what was collected.
        span: over which it was averaged.
        below: short has fewer thinking tokens, strictly.
        above: long has more, strictly.
        percentiles: (low, high) instead of the thresholds.
        by_group: compare within groups of items of equal size.
        include_unclosed: take thoughts that never close too.
        splits: for the split-half stability in the provenance; 0 leaves it out.
        seed: of the splits.

    Raises:
        SteerError: the summary lacks the site or span, or there is no short or no long trace.
    """
    name = quantity(site, span)
    rule = LengthRule(below, above, percentiles, by_group, include_unclosed)
    choice = chosen_rows(summary, name, rule)
    vectors = combined(summary, name, [choice])[0]
    options: dict[str, Any] = {"span": span, **choice.to_dict()}
    if splits:
        options["split_half"] = _told(_halves(summary, name, choice, splits, seed))
    story = artifacts.provenance(
        convention=CONVENTION,
        data_hash=summary.data_hash,
        data_count=len(choice.short) + len(choice.long),
        options=options,
        seed=seed if splits else None,
    )
    return Direction(
        vectors,
        summary.kept(name).layers or (),
        site,
        summary.model,
        {key: story[key] for key in story if key not in ("model", "site", "content")},
    )


def split_half(summary: Summary, direction: Direction, *, splits: int = SPLITS, seed: int = 0) -> SplitHalf:
    """Return the cosine between directions from two halves of the questions, over several splits.

    Args:
        summary: the direction was made from it, or from one of the same traces.
        direction: made by `length_direction`; its rule is used again.
        splits: how many to draw.
        seed: of the draws.

    Raises:
        SteerError: the direction does not say its rule, or too few questions have short and long traces.
    """
    rule, span = rule_of(direction)
    name = quantity(direction.site, span)
    found = _halves(summary, name, chosen_rows(summary, name, rule), splits, seed)
    if found is None:
        raise SteerError(
            "no split leaves short and long traces in both halves of the questions",
            "at least two questions with short and two with long thoughts",
            "Collect more traces",
        )
    return found


def rule_of(direction: Direction) -> tuple[LengthRule, str]:
    """Return the length rule and the span that a direction's provenance holds.

    Raises:
        SteerError: it holds none.
    """
    options = direction.provenance.get("options") or {}
    if not isinstance(options.get("rule"), dict) or not isinstance(options.get("span"), str):
        raise SteerError(
            "the direction does not say which traces were short and which long",
            "one made by length_direction",
            'Make it with `steer probe length`, or score over all traces with group="all"',
        )
    return LengthRule.from_dict(options["rule"]), options["span"]


def chosen_rows(summary: Summary, name: str, rule: LengthRule) -> Choice:
    """Return the short and long rows of a summary under a rule; errors as `length_direction`."""
    present = summary.present(name)
    if summary.keep == "trace":
        return choose(summary.rows, present, rule, summary.meta["traces"].get("dropped"))
    places = {row.id: index for index, row in enumerate(summary.rows)}
    if not {"short", "long"} <= set(places) or rule.by_group:
        raise SteerError(
            f"the summary keeps only means of the groups {', '.join(places)}",
            "one row per trace, or groups called short and long",
            "Collect with --keep trace",
        )
    counts = {"short": summary.rows[places["short"]].traces, "long": summary.rows[places["long"]].traces}
    return Choice((Stratum(None, (places["short"],), (places["long"],)),), rule, counts, {})


def combined(summary: Summary, name: str, choices: Sequence[Choice]) -> Float64[Tensor, "choice layer *width"]:
    """Return mean(long) - mean(short) for several choices in one pass over the summary."""
    weights = statistics.as_tensor([statistics.contrast(choice.strata, len(summary)) for choice in choices])
    return summary.combine(name, weights)


def _halves(summary: Summary, name: str, choice: Choice, splits: int, seed: int) -> SplitHalf | None:
    if summary.keep != "trace":
        return None
    pairs = statistics.halves(choice, [row.item for row in summary.rows], splits, seed)
    if not pairs:
        return None
    vectors = combined(summary, name, [half for pair in pairs for half in pair])
    table = torch.stack([statistics.cosines(vectors[2 * n], vectors[2 * n + 1]) for n in range(len(pairs))]).numpy()
    lower, upper = np.percentile(table, [5, 95], axis=0)
    layers = summary.kept(name).layers or ()
    return SplitHalf(layers, tuple(table.mean(0).tolist()), tuple(lower.tolist()), tuple(upper.tolist()), len(pairs))


def _told(found: SplitHalf | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "splits": found.splits,
        "layers": list(found.layers),
        "mean": list(found.mean),
        "lower": list(found.lower),
        "upper": list(found.upper),
    }
