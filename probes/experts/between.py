"""Experts that one set of tokens chooses more often than another: SteerMoE's detection (arXiv 2509.09660).

d(l, e) = K_one / T_one - K_other / T_other, the difference of the rates at which tokens of two summaries choose an expert.
The sets are read as one: the tokens of the first are the "marker", so that k = K_one, M = T_one, and K, T count both.
"""

from __future__ import annotations

import numpy as np
import torch

from probes.collect.routing import ALL, COUNT
from probes.collect.summary import Summary
from probes.experts.formulas import Numbers
from probes.experts.score import RESAMPLES, percentiles
from steer import artifacts, intervals
from steer.errors import SteerError
from steer.expert_scores import ExpertScores
from steer.identity import check_same
from steer.scored_markers import ScoredMarker

CONVENTION = "rate among the tokens of the first set minus rate among the second's; lower, upper: 2.5 and 97.5 % over resampled questions"  # fmt: skip


def expert_differences(
    one: Summary,
    other: Summary,
    *,
    span: str = ALL,
    names: tuple[str, str] = ("one", "other"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ExpertScores:
    """Return risk differences between the tokens of two summaries.

    Where both answer the same questions, the same questions are drawn for both, so that what a pair shares cancels; else
    each is resampled by itself. There are no chances: between two sets of texts, nothing says what could be exchanged.

    Args:
        one, other: of the same model, both made with `RouterCounts((span,))`, one row per trace.
        span: the tokens that are compared.
        names: of the sets, for tables and pictures.
        resamples: of the questions; 0 leaves the interval out.
        seed: of the resamples.

    Raises:
        SteerError: summaries of models that differ, nothing counted over the span, or groups in place of traces.
    """
    check_same(one.model, other.model, f"the summary of {names[0]!r}")
    name = f"{COUNT}/{span}"
    kept = one.kept(name)
    if other.kept(name).layers != kept.layers or kept.layers is None:
        raise SteerError("the two summaries count other layers", "the same layers in both", "Collect both alike")
    if "group" in (one.keep, other.keep):
        raise SteerError("a summary keeps groups, which do not say how many tokens they have", "one row per trace", "Collect with --keep trace")  # fmt: skip
    totals = [_tokens(summary, span) for summary in (one, other)]
    once = [np.ones((1, len(summary))) for summary in (one, other)]
    (first, second), (here, there) = (
        [_sums(*each)[0] for each in zip((one, other), (name, name), once, strict=True)],
        totals,
    )
    found = {"values": torch.from_numpy(first / here - second / there)}
    if resamples:
        per_token = float(first[0].sum()) / here
        rates = []
        for summary, weights in zip((one, other), _weights(one, other, resamples, seed), strict=True):
            sums = _sums(summary, name, weights)
            with np.errstate(invalid="ignore"):  # A resample without any token of the span has no rate: NaN.
                rates.append(sums * per_token / sums[:, :1].sum(axis=2, keepdims=True))
        lower, upper = percentiles(rates[0] - rates[1])
        found |= {"lower": torch.from_numpy(lower), "upper": torch.from_numpy(upper)}
    story = artifacts.provenance(
        site="router",
        convention=CONVENTION,
        data_count=len(one) + len(other),
        options={"span": span, "names": list(names), "resamples": resamples, "data": [one.data_hash, other.data_hash]},
        seed=seed,
    )
    return ExpertScores(
        **found,
        layers=kept.layers,
        chosen=torch.from_numpy(first + second).long(),
        together=torch.from_numpy(first[None]).long(),
        tokens=sum(totals),
        markers=(ScoredMarker(names[0], 1.0, here),),
        method="risk_difference",
        model=one.model,
        provenance={key: story[key] for key in story if key not in ("model", "content")},
    )


def _sums(summary: Summary, name: str, weights: Numbers) -> Numbers:
    """Weighted sums of the counts, (resample, layer, expert)."""
    found: Numbers = summary.combine(name, torch.from_numpy(weights)).numpy()
    return found


def _tokens(summary: Summary, span: str) -> int:
    """How many tokens of the span there are.

    Raises:
        SteerError: none.
    """
    if span == ALL:
        return int(summary.meta["traces"]["tokens"])
    found = sum(row.positions[span] for row in summary.rows)
    if not found:
        raise SteerError(f"no trace of {summary.folder or 'a summary in memory'} has the span {span!r}", "traces that have it", "Choose another span")  # fmt: skip
    return found


def _weights(one: Summary, other: Summary, resamples: int, seed: int) -> list[Numbers]:
    """How often each row is drawn, (resample, row), for both: the same questions where both have the same."""
    items = [[str(row.item) for row in summary.rows] for summary in (one, other)]
    paired = set(items[0]) == set(items[1])
    found = []
    for place, mine in enumerate(items):
        names = {name: at for at, name in enumerate(sorted(set(mine)))}
        drawn = intervals.weights(len(names), resamples, seed if paired else 2 * seed + place)
        found.append(drawn[:, [names[item] for item in mine]])
    return found
