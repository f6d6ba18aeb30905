"""Whether the heads with the largest scores carry the effect: activation patching of `z`.

A score says what a head writes along a direction, not what follows from it. Here the heads' `z` are replaced, at every
generated position of short thoughts, by their mean over long thoughts, and by their mean over short ones; the difference
of what the model then does is the effect of the heads (mean patching; that both sides are means takes out what replacing
does by itself). What the model does is the mean, over the thinking span, of the log probability in nats that the thought
closes now, so a negative effect makes thoughts longer.

The share is effect(chosen heads) / effect(all heads), as a ratio of means over traces with an interval over questions.
Effects of heads do not add up, so shares of two sets may exceed 1 together. Beside it stand equally many random heads.
The method is ours; ThinkEdit (arXiv 2503.22048) attributes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes import statistics
from probes.collect.means import quantity
from probes.collect.plan import make_plan
from probes.collect.rows import row_of
from probes.collect.summary import Summary
from probes.directions import chosen_rows, rule_of
from steer.directions import Direction
from steer.errors import SteerError
from steer.intervals import Interval, Numbers, Weights, bootstrap
from steer.interventions import Custom
from steer.shards import Shard
from steer.steering import Steering
from steer.tables import table
from steer.traces import Trace, Traces
from steer.vocabulary_head import chunk_of, head_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from steer.model import SteerableModel

Head = tuple[int, int]
BATCH_TOKENS = 4096
PHASE = "generated"


@dataclass(frozen=True)
class Patched:
    """What patching one set of heads does.

    Attributes:
        name: "chosen", "all heads" or "random 1", ….
        heads: how many.
        effect: nats, mean over traces.
        share: of the effect of all heads; None for these themselves.
    """

    name: str
    heads: int
    effect: Interval
    share: Interval | None


@dataclass(frozen=True)
class CausalShare:
    """The share of the effect that chosen heads carry.

    Attributes:
        sets: chosen heads first, then all heads, then random ones.
        traces, questions: how many were run.
        span: whose positions count.
    """

    sets: tuple[Patched, ...]
    traces: int
    questions: int
    span: str

    @property
    def share(self) -> Interval:
        """Of the chosen heads."""
        found = self.sets[0].share
        assert found is not None
        return found

    @property
    def total_is_clear(self) -> bool:
        """Whether the interval of the total effect leaves out zero; else a share of it says nothing."""
        total = self.sets[1].effect
        return total.low is not None and total.high is not None and (total.low > 0 or total.high < 0)

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping per set of heads."""
        return [
            {"set": each.name, "heads": each.heads, **_named("effect", each.effect), **_named("share", each.share)}
            for each in self.sets
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "sets": self.rows(), "total_is_clear": self.total_is_clear}

    def frame(self) -> DataFrame:
        """Return one row per set of heads."""
        rows = self.rows()
        return table(rows, list(rows[0]))

    def plot(self) -> Figure:
        """Draw the effect of every set, with its interval."""
        from steer.figures import BLUE, GREY, ORANGE, canvas

        figure, axes = canvas(1)
        colours = [ORANGE, BLUE, *[GREY] * (len(self.sets) - 2)]
        for place, (each, colour) in enumerate(zip(self.sets, colours, strict=True)):
            low, value, high = (getattr(each.effect, end) or 0.0 for end in ("low", "value", "high"))
            axes[0].errorbar(value, -place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        axes[0].set_yticks(
            [-place for place in range(len(self.sets))], [f"{each.name} ({each.heads})" for each in self.sets]
        )
        axes[0].axvline(0, color=GREY, linewidth=0.8)
        axes[0].set(
            xlabel="change of the log probability that the thought closes, nats", title=f"{self.traces} short thoughts"
        )
        return figure

    def _repr_html_(self) -> str:
        told = "".join(
            f"<tr><td>{'</td><td>'.join(_cell(value) for value in row.values())}</td></tr>" for row in self.rows()
        )
        heads = "".join(f"<th>{name}</th>" for name in self.rows()[0])
        return f"<p>{self.traces} short thoughts</p><table><tr>{heads}</tr>{told}</table>"


def causal_share(
    model: SteerableModel,
    traces: Traces,
    summary: Summary,
    direction: Direction,
    heads: Sequence[Head],
    *,
    controls: int = 5,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> CausalShare:
    """Return which share of the effect of all heads the chosen ones carry, on short thoughts.

    Args:
        model: that wrote the traces.
        traces: among them the short ones of the summary.
        summary: holds `z` over the direction's span, of traces.
        direction: made by `length_direction`; says which traces are short and long.
        heads: (layer, head), such as `scores.top(3)`.
        controls: how many sets of equally many random heads.
        limit: most short traces to run; the first by id.
        seed: of the random heads.
        batch_tokens: most tokens of a forward pass.

    Raises:
        SteerError: no marks, a head that is not there or not collected, another model's summary, no short trace among
            `traces`, others than were collected, or more heads than there are to choose from.
    """
    summary.check_model(model.identity)
    if not model.marks.exist:
        raise SteerError("the model has no marks that close a thought", "a model with thinking marks")
    rule, span = rule_of(direction)
    layers = summary.kept(quantity("z", span)).layers or ()
    sets = _sets(heads, layers, model.anatomy.heads, controls, seed)
    choice = chosen_rows(summary, quantity(direction.site, span), rule)
    weights = [statistics.mean_of(rows, len(summary)) for rows in (choice.short, choice.long)]
    short, long = summary.combine(quantity("z", span), statistics.as_tensor(weights)).float()
    known = {trace.id: trace for trace in traces}
    wanted = sorted(summary.rows[row].id for row in choice.short if summary.rows[row].id in known)[:limit]
    if not wanted:
        raise SteerError(
            "none of the short traces of the summary was given", "the run that was collected", "Pass its traces"
        )
    _check_traces(summary, {name: known[name] for name in wanted})
    closing = _Closing(model, [known[name] for name in wanted], span, batch_tokens)
    effects = {}
    for label, members in sets.items():
        mask = _mask(members, layers, model.anatomy.heads)
        towards_long, towards_short = (closing.under(_replaced(mask, layers, mean)) for mean in (long, short))
        effects[label] = towards_long - towards_short
    return _told(sets, effects, closing.traces, span)


def _check_traces(summary: Summary, traces: Mapping[str, Trace]) -> None:
    """Refuse traces of another run, whose ids may be the same."""
    rows = {row.id: row for row in summary.rows}
    for name, trace in traces.items():
        row = rows[name]
        if row_of(trace, {}) != replace(row, positions={}, correct=trace.correct, group=trace.group):
            raise SteerError(
                f"the trace {name} has {trace.thought_length} tokens of thought, and the one that was collected {row.length}",
                "the run that was collected",
                "Pass its traces",
            )


def _sets(heads: Sequence[Head], layers: Sequence[int], width: int, controls: int, seed: int) -> dict[str, list[Head]]:
    """The chosen heads, all of them, and equally many at random, by name."""
    everything = [(layer, head) for layer in layers for head in range(width)]
    chosen = list(dict.fromkeys(heads))
    if not chosen or not set(chosen) <= set(everything):
        raise SteerError(f"the heads are {chosen}", f"(layer, head) with layers {list(layers)} and heads below {width}")
    random = np.random.default_rng(seed)
    drawn = [random.choice(len(everything), len(chosen), replace=False) for _ in range(controls)]
    controlled = {f"random {draw + 1}": [everything[place] for place in places] for draw, places in enumerate(drawn)}
    return {"chosen": chosen, "all heads": everything, **controlled}


def _told(sets: dict[str, list[Head]], effects: dict[str, Numbers], traces: Sequence[Trace], span: str) -> CausalShare:
    items = np.unique([trace.item for trace in traces], return_inverse=True)[1]
    questions = int(items.max()) + 1
    sums = {label: np.bincount(items, values, questions) for label, values in effects.items()}
    counts = np.bincount(items, minlength=questions).astype(float)

    def mean(label: str) -> Interval:
        return bootstrap(lambda drawn: (drawn @ sums[label]) / (drawn @ counts), questions)

    def ratio(label: str) -> Interval:
        def share(drawn: Weights) -> Numbers:
            with np.errstate(invalid="ignore", divide="ignore"):
                found: Numbers = (drawn @ sums[label]) / (drawn @ sums["all heads"])
            return found

        return bootstrap(share, questions)

    rows = [
        Patched(label, len(members), mean(label), None if label == "all heads" else ratio(label))
        for label, members in sets.items()
    ]
    return CausalShare(tuple(rows), len(traces), questions, span)


class _Closing:
    """The mean log probability, over a span of each trace, that the thought closes with the next token."""

    def __init__(self, model: SteerableModel, traces: Sequence[Trace], span: str, batch_tokens: int) -> None:
        self.model, self.traces, self.span, self.batch_tokens = model, traces, span, batch_tokens
        self.plan = make_plan(model, {trace.id: trace for trace in traces}, (span,), {}, longest=model.longest)
        self.tokens = sorted({mark[0] for mark in model.marks.closing})
        self.head = head_of(model)
        self.chunk = chunk_of(model)

    def under(self, steering: Steering) -> Numbers:
        """Return one number per trace, in the order of the traces, in nats."""
        found: dict[str, float] = {}
        everything = Shard(0, tuple(trace.id for trace in self.traces))
        for batch in self.plan.batches(everything, self.batch_tokens):
            rows = [trace.tokens for trace in batch.traces]
            with self.model.steered(steering):
                states = self.model.run(
                    rows,
                    [trace.prompt_length for trace in batch.traces],
                    [trace.generation_prompt_start for trace in batch.traces],
                    head=False,
                )
            for trace, state, places in zip(batch.traces, states, batch.positions[self.span], strict=True):
                found[trace.id] = self._mean(state[list(places)])
        return np.array([found[trace.id] for trace in self.traces])

    def _mean(self, states: Float[Tensor, "position hidden"]) -> float:
        total = 0.0
        for part in torch.split(states, self.chunk):
            logits = self.head(part)
            closing = torch.logsumexp(logits[:, self.tokens], -1) - torch.logsumexp(logits, -1)
            total += float(closing.double().sum())
        return total / len(states)


def _mask(heads: Sequence[Head], layers: Sequence[int], width: int) -> Bool[Tensor, "layer head"]:
    mask = torch.zeros(len(layers), width, dtype=torch.bool)
    for layer, head in heads:
        mask[list(layers).index(layer), head] = True
    return mask


def _replaced(
    mask: Bool[Tensor, "layer head"], layers: Sequence[int], mean: Float[Tensor, "layer head width"]
) -> Steering:
    """Return a steering that sets z of the masked heads to their means."""
    places = {layer: index for index, layer in enumerate(layers)}

    def change(z: Tensor, layer: int) -> Tensor:
        index = places[layer]
        target = mean[index].to(z.device, z.dtype)
        return torch.where(mask[index].to(z.device)[:, None], target - z, torch.zeros_like(z))

    touched = tuple(layer for layer, index in places.items() if bool(mask[index].any()))
    return Steering((Custom(change, "z", touched, PHASE),))


def _named(name: str, interval: Interval | None) -> dict[str, float | None]:
    ends = (None, None, None) if interval is None else (interval.value, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
