"""Expert scores: how closely each expert goes with markers, with an interval, a chance and a false-discovery rate.

arXiv 2505.14681 (RICE), §3: score(l, e) = sum over markers x of sign_x nPMI(x, e), from counts over all tokens of prompts
and replies; the experts of all layers are ranked together. Other formulas: `probes.experts.formulas`.

Interval: 2.5th and 97.5th percentile over resamples of the questions (all replies to a drawn question come with it); a
resample without the marker or without the expert has no score and is left out. Chance: `probes.experts.null`, one-sided,
large scores being those looked for. False discoveries: Benjamini and Hochberg (1995) over the scored experts of all layers,
or Benjamini and Yekutieli's (2001) correction, which holds whatever the dependence; experts of one token exclude each
other. All three are ours.

What a small chance says: the marker's tokens are routed unlike random tokens of the same traces. A router tells many words
from the rest, so that is not yet to say that the expert has to do with thinking: scaling it beside others like it says that.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import false_discovery_control

from probes.collect.routing import COUNT
from probes.collect.summary import Summary
from probes.experts.counts import EVERY, MARKERS, Counts, Integers, count, span_of
from probes.experts.formulas import Formula, Given, Numbers
from probes.experts.formulas import method as formula_of
from probes.experts.null import Null, chances
from steer import artifacts, intervals
from steer.errors import SteerError
from steer.expert_scores import ExpertScores

if TYPE_CHECKING:
    from steer.model import SteerableModel

CONVENTION = (
    "signed sum over markers, logical experts; lower, upper: 2.5 and 97.5 % over resampled questions; p_value: exact, "
    "one-sided, marker places permuted within each trace, alike in all replies to a question; q_value: false-discovery rate over all scored experts"
)
CORRECTIONS = ("bh", "by")
RESAMPLES = 1000
_BLOCK = 2**21  # Numbers per array of resampled counts.


def expert_scores(
    summary: Summary,
    markers: Mapping[str, float] = MARKERS,
    *,
    method: str = "npmi",
    resamples: int = RESAMPLES,
    null: bool = True,
    correction: str = "bh",
    seed: int = 0,
    model: SteerableModel | None = None,
) -> ExpertScores:
    """Score the experts of every layer that was counted.

    Memory is that of the resampled counts of some layers, of the distributions of k, and of one shard.

    Args:
        summary: made with `recorder_for(markers)`; with one row per trace for an interval and for chances.
        markers: text -> weight in the sum; several texts between commas are one marker.
        method: one of `probes.experts.METHODS`.
        resamples: of the questions, for the interval; 0 leaves it out.
        null: whether to compute chances and false-discovery rates.
        correction: "bh" or "by".
        seed: of the resamples.
        model: whose tokenizer says how the markers are written, which the scores then tell; must be the summary's.

    Raises:
        SteerError: an unknown method or correction, a weight of 0 or none at all, nothing counted at a marker or a marker
            that stands nowhere, an interval or chances from a summary of groups, another model's summary.
    """
    formula = formula_of(method)
    _check_request(markers, resamples, correction)
    if model is not None:
        summary.check_model(model.identity)
    _require_traces(summary, resamples, null)
    counts = count(summary, markers, None if model is None else model.tokenizer)
    marked = [float(marker.marked) for marker in counts.markers]
    together, chosen = counts.together.astype(np.float64), counts.chosen.astype(np.float64)
    values = _signed(formula, counts, list(together), chosen, marked, float(counts.tokens))
    found: dict[str, Any] = {"values": torch.from_numpy(values)}
    if resamples:
        lower, upper = _interval(summary, counts, formula, resamples, seed)
        found |= {"lower": torch.from_numpy(lower), "upper": torch.from_numpy(upper)}
    if null:
        p_value = _chances(summary, counts, formula)
        found |= {"p_value": torch.from_numpy(p_value), "q_value": torch.from_numpy(_corrected(p_value, correction))}
    story = artifacts.provenance(
        site="router",
        convention=CONVENTION,
        data_hash=summary.data_hash,
        data_count=sum(row.traces for row in summary.rows),
        options={"resamples": resamples, "null": null, "correction": correction if null else None},
        seed=seed,
    )
    return ExpertScores(
        **found,
        layers=counts.layers,
        chosen=torch.from_numpy(counts.chosen),
        together=torch.from_numpy(counts.together),
        tokens=counts.tokens,
        markers=counts.markers,
        method=method,
        model=summary.model,
        provenance={key: story[key] for key in story if key not in ("model", "content")},
    )


def known_correction(name: str) -> None:
    """Refuse a correction that does not exist.

    Raises:
        SteerError: there is none of that name.
    """
    if name not in CORRECTIONS:
        raise SteerError(f"there is no correction {name!r}", f"one of {', '.join(CORRECTIONS)}")


def _check_request(markers: Mapping[str, float], resamples: int, correction: str) -> None:
    known_correction(correction)
    if resamples < 0:
        raise SteerError(f"{resamples} resamples were asked for", "0, for no interval, or more")
    for text, sign in markers.items():
        if not math.isfinite(sign) or not sign:
            raise SteerError(
                f"the marker {text!r} has the weight {sign}",
                "a number other than 0",
                "Leave it out, or weigh it 1 or -1",
            )


def _require_traces(summary: Summary, resamples: int, null: bool) -> None:
    if summary.keep == "trace" or not (resamples or null):
        return
    asked = [told for told, wanted in (("an interval over questions", resamples), ("chances", null)) if wanted]
    raise SteerError(
        f"the summary keeps groups, which have neither questions to resample nor traces within which markers could "
        f"stand elsewhere, and {' and '.join(asked)} were asked for",
        "one row per trace",
        "Collect with --keep trace, or leave both out: --resamples 0 --no-null (resamples=0, null=False)",
    )


def _signed(
    formula: Formula,
    counts: Counts,
    together: Sequence[Numbers],
    chosen: Numbers,
    marked: Sequence[Given],
    tokens: Given,
) -> Numbers:
    """The signed sum over markers; `marked` and `tokens` broadcast to the shape of the others."""
    total = np.zeros(chosen.shape)
    for marker, k, number in zip(counts.markers, together, marked, strict=True):
        total += marker.sign * formula(k, chosen, number, tokens)
    return total


def _interval(summary: Summary, counts: Counts, formula: Formula, resamples: int, seed: int) -> tuple[Numbers, Numbers]:
    """Percentiles over resampled questions, some layers at a time; shapes (layer, expert)."""
    items = [str(row.item) for row in summary.rows]
    names = {name: place for place, name in enumerate(sorted(set(items)))}
    drawn = intervals.weights(len(names), resamples, seed)[:, [names[item] for item in items]]
    spans = [span_of(marker.text) for marker in counts.markers]
    marked = [(drawn @ _marked(summary, span))[:, None, None] for span in spans]
    tokens = (drawn @ _tokens(summary, counts))[:, None, None]
    weights = torch.from_numpy(drawn)
    step = max(1, _BLOCK // (resamples * counts.chosen.shape[1]))
    ends: list[Numbers] = []
    for start in range(0, len(counts.layers), step):
        layers = counts.layers[start : start + step]
        chosen = summary.combine(EVERY, weights, layers).numpy()
        together = [summary.combine(f"{COUNT}/{span}", weights, layers).numpy() for span in spans]
        ends.append(percentiles(_signed(formula, counts, together, chosen, marked, tokens)))
    lower, upper = np.concatenate(ends, axis=1)
    return lower, upper


def percentiles(draws: Numbers, at: Sequence[float] = (0.025, 0.975)) -> Numbers:
    """Return percentiles over the first axis, NaN left out; NaN where nothing else is there. Linear, as numpy's."""
    ordered = np.sort(draws, axis=0)  # NaN goes last.
    last = np.maximum(np.isfinite(ordered).sum(axis=0) - 1, 0)
    found = []
    for share in at:
        place = share * last
        low = np.floor(place).astype(np.int64)
        one, next_one = (np.take_along_axis(ordered, np.minimum(each, last)[None], 0)[0] for each in (low, low + 1))
        found.append(one + (place - low) * (next_one - one))
    return np.stack(found)


def _marked(summary: Summary, span: str) -> Numbers:
    """m_i, tokens of each trace that are the marker."""
    return np.array([row.positions[span] for row in summary.rows], dtype=np.float64)


def _tokens(summary: Summary, counts: Counts) -> Numbers:
    """T_i, tokens of each trace."""
    found: Numbers = summary.values(EVERY, counts.layers[:1]).sum(dim=(1, 2)).numpy() / counts.per_token
    return found


def _chances(summary: Summary, counts: Counts, formula: Formula) -> Numbers:
    """p-values, (layer, expert), reading one shard at a time and keeping what is read of a question until it is whole."""
    chosen = counts.chosen.ravel()
    spans = [span_of(marker.text) for marker in counts.markers]
    marked = [_marked(summary, span).astype(np.int64) for span in spans]
    items = [str(row.item) for row in summary.rows]
    nulls = [Null(chosen, len({item for item, here in zip(items, each, strict=True) if here})) for each in marked]
    left, waiting = Counter(items), defaultdict[str, list[tuple[int, Integers]]](list)
    for row, per_trace in enumerate(_traces(summary)):
        item = items[row]
        waiting[item].append((row, per_trace.ravel()))
        if len(waiting[item]) < left[item]:
            continue
        replies = waiting.pop(item)
        tokens = [int(each.sum()) // (counts.per_token * len(counts.layers)) for _, each in replies]
        for null, each in zip(nulls, marked, strict=True):
            here = [(k, total, int(each[at])) for (at, k), total in zip(replies, tokens, strict=True) if each[at]]
            if here:
                null.add(here)
    found = chances(
        nulls,
        formula,
        [marker.sign for marker in counts.markers],
        chosen,
        counts.together.reshape(len(spans), -1),
        [marker.marked for marker in counts.markers],
        counts.tokens,
    )
    return found.reshape(counts.chosen.shape)


def _traces(summary: Summary) -> Iterator[Integers]:
    """K_i of every trace, (layer, expert), in the order of the rows."""
    for shard in summary.shards:
        yield from shard.tensor(EVERY).numpy().astype(np.int64)


def _corrected(p_value: Numbers, correction: str) -> Numbers:
    """Return q-values of the scored experts; NaN elsewhere."""
    found = np.full(p_value.shape, np.nan)
    scored = np.isfinite(p_value)
    found[scored] = false_discovery_control(p_value[scored], method=correction)
    return found
