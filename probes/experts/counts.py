"""What expert scores are made of: tokens that are a marker, tokens that choose an expert, tokens that do both.

A marker counts where it is the input token, the last one where it is written with several, anywhere in prompt and reply:
chat templates often write the opening mark at the end of the prompt. Several texts between commas are one marker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.collect.recorders import Layers
from probes.collect.routing import ALL, COUNT, RouterCounts
from probes.collect.summary import Summary
from steer.errors import SteerError
from steer.marks import Marks
from steer.scored_markers import ScoredMarker
from steer.spans import marker_ids, parse_marker
from steer.trace import decode

MARKERS: Mapping[str, float] = {"<think>": 1, "</think>": -1, "Alternatively": -1}
"""RICE's markers and their weights: experts that open a thought, rather than end or turn it."""
EVERY = f"{COUNT}/{ALL}"
Integers = NDArray[np.int64]


def span_of(text: str) -> str:
    """Return the span of a marker, anywhere in prompt and reply; errors as `steer.spans.parse_marker`."""
    span = f"marker:{text}@all"
    parse_marker(span)
    return span


def recorder_for(markers: Mapping[str, float] = MARKERS) -> RouterCounts:
    """Return the recorder that counts what scores of these markers need.

    Raises:
        SteerError: no marker, or one that cannot be read.
    """
    if not markers:
        raise SteerError("no marker was named", "at least one, such as <think>", "Name the words that open and close a thought")  # fmt: skip
    return RouterCounts((ALL, *(span_of(text) for text in markers)))


def marks_as_markers(marks: Marks, tokenizer: Any) -> dict[str, float]:
    """Return the opening marks of a model as one marker of weight 1, the closing ones as one of weight -1.

    Raises:
        SteerError: the model has no marks.
    """
    if not marks.exist:
        raise SteerError(
            "this model has no marks around its thinking, so no marker stands to reason",
            "the words that open and close a thought",
            "Name them: --marker 'Let me think' --marker '-So the answer' (markers={…})",
        )
    sides = ((marks.opening, 1.0), (marks.closing, -1.0))
    return {",".join(dict.fromkeys(decode(tokenizer, mark).strip() for mark in side)): sign for side, sign in sides}


def resolved(text: str, tokenizer: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Return every way in which a tokenizer writes a marker, as token ids and as what they decode to.

    Pieces of a variant of several tokens are kept apart by `|`.

    Raises:
        SteerError: the tokenizer cannot write it.
    """
    texts = parse_marker(span_of(text)).texts
    variants = tuple(dict.fromkeys(ids for each in texts for ids in marker_ids(each, tokenizer)))
    return variants, tuple("|".join(decode(tokenizer, (token,)) for token in ids) for ids in variants)


@dataclass(frozen=True, eq=False)
class Counts:
    """The sums over all traces.

    Attributes:
        layers: that have experts and were read.
        tokens: T.
        per_token: how many experts a token chooses in each layer.
        chosen: K, (layer, expert).
        together: k, (marker, layer, expert).
        markers: with M.
    """

    layers: Layers
    tokens: int
    per_token: int
    chosen: Integers
    together: Integers
    markers: tuple[ScoredMarker, ...]


def count(summary: Summary, markers: Mapping[str, float], tokenizer: Any = None) -> Counts:
    """Add up the counts of a summary.

    Args:
        summary: holds `router.count` over `all` and over every marker, as `recorder_for` asks.
        markers: text -> weight in the sum.
        tokenizer: says how the markers are written; None leaves that unsaid.

    Raises:
        SteerError: nothing of the kind was counted, a marker that stands nowhere or everywhere, or counts that do not
            add up to the same number of experts for every token.
    """
    _require_counted(summary, recorder_for(markers))
    kept = summary.kept(EVERY)
    ones = torch.ones(1, len(summary), dtype=torch.float64)
    chosen = _whole(summary.combine(EVERY, ones))
    tokens = int(summary.meta["traces"]["tokens"])
    per_token = _per_token(chosen, tokens)
    found, scored = [], []
    for text, sign in markers.items():
        together = _whole(summary.combine(f"{COUNT}/{span_of(text)}", ones))
        marked = int(together[0].sum()) // per_token
        if not 0 < marked < tokens:
            where = "at none" if not marked else "at every one"
            raise SteerError(
                f"the marker {text!r} stands {where} of the {tokens} tokens of these traces",
                "markers at some of them",
                "Leave it out (--marker, markers=), or read traces that hold it",
            )
        found.append(together)
        scored.append(ScoredMarker(text, sign, marked, *(() if tokenizer is None else resolved(text, tokenizer))))
    return Counts(tuple(kept.layers or ()), tokens, per_token, chosen, np.stack(found), tuple(scored))


def _require_counted(summary: Summary, recorder: RouterCounts) -> None:
    """Refuse a summary that was not made with the recorder, and say how to make one."""
    missing = [span for span in recorder.spans if f"{COUNT}/{span}" not in summary.quantities]
    if missing:
        options = ",".join(f"spans={span}" for span in recorder.spans)
        raise SteerError(
            f"the summary has no {COUNT} over {', '.join(missing)}",
            "counts over all tokens and over every marker",
            f"Collect again with --recorder 'router_counts:{options}' (recorder_for(markers)), or give the run",
        )


def occurrences(summary: Summary, text: str) -> int:
    """Return at how many tokens a marker stands; errors as `Summary.kept`."""
    ones = torch.ones(1, len(summary), dtype=torch.float64)
    per_token = _per_token(_whole(summary.combine(EVERY, ones)), int(summary.meta["traces"]["tokens"]))
    return int(_whole(summary.combine(f"{COUNT}/{span_of(text)}", ones))[0].sum()) // per_token


def _whole(sums: Tensor) -> Integers:
    found: Integers = sums[0].numpy().round().astype(np.int64)
    return found


def _per_token(chosen: Integers, tokens: int) -> int:
    sums = set(chosen.sum(1).tolist())
    if len(sums) != 1 or (total := sums.pop()) % tokens:
        raise SteerError(
            f"{tokens} tokens chose {sorted({*chosen.sum(1).tolist()})} experts in the layers of this summary",
            "the same number of experts for every token and layer",
            "Collect again",
        )
    return int(total // tokens)
