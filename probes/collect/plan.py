"""What a collection will do, known before the model runs: which traces, in which batches, how many bytes.

A trace is left out, with its reason counted, where it is longer than the model or the caller allows, where it has no
prompt, where none of the wanted spans has a position in it, or where it belongs to no group although groups are kept.

Planning reads the traces once, in the order of their ids, and holds none of them: of each the plan keeps its id, and
its group where groups are kept. Spans are found again when a shard is read.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from probes.collect.reader import Model
from probes.collect.recorders import Batch, Kept
from steer.errors import SteerError
from steer.identity import digest
from steer.shards import Shard, cut
from steer.spans import span_positions
from steer.traces import Trace, trace_line

Positions = dict[str, Sequence[int]]
Finder = Callable[[Trace], Positions]
TOO_LONG, NO_SPAN, NO_GROUP, EMPTY, NO_PROMPT = (
    "longer than the model or max_tokens allows",
    "no position in any wanted span",
    "in no group",
    "without tokens",
    "without a prompt",
)
REMEDIES = {
    TOO_LONG: "Allow more tokens, if the model does",
    NO_GROUP: "Give every trace a group, or keep traces (--keep trace)",
    NO_SPAN: "Choose a span that these traces have (before_answer for a model without thinking marks), or other traces",
}


@dataclass(frozen=True)
class Plan:
    """What will be read and written.

    Attributes:
        source: all traces given, by id; the shards say which are read.
        find: trace -> span -> its token positions.
        shards: of sorted ids.
        shard_tokens: per shard, tokens that the model will see, padding not counted.
        groups: id -> label, where groups are kept instead of traces.
        dropped: reason -> how many traces.
        unclosed, truncated: among those read, thoughts without an end and replies cut by the token limit.
        plan_bytes: size of the tensors that will be kept.
        traces_hash: of all traces given, dropped ones too.
        keeps: the quantities of all recorders.
    """

    source: Mapping[str, Trace] = field(repr=False)
    find: Finder = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    shard_tokens: tuple[int, ...] = field(repr=False)
    groups: Mapping[str, str] | None = field(repr=False)
    dropped: Mapping[str, int]
    unclosed: int
    truncated: int
    plan_bytes: int
    traces_hash: str
    keeps: Mapping[str, Kept] = field(repr=False)

    @property
    def given(self) -> int:
        """How many traces were given."""
        return len(self.source)

    @property
    def read(self) -> int:
        """How many of them will be read."""
        return sum(len(shard.ids) for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens that the model will see, padding not counted."""
        return sum(self.shard_tokens)

    def batches(self, shard: Shard, batch_tokens: int) -> list[Batch]:
        """Cut a shard into batches: sorted by length, each at most `batch_tokens` with padding (or one trace)."""
        ordered = sorted((self.source[name] for name in shard.ids), key=lambda trace: (len(trace.tokens), trace.id))
        rows: list[list[Trace]] = []
        for trace in ordered:
            if rows and len(trace.tokens) * (len(rows[-1]) + 1) <= batch_tokens:
                rows[-1].append(trace)
            else:
                rows.append([trace])
        return [batch_of(row, self.find) for row in rows]


def batch_of(traces: Sequence[Trace], find: Finder) -> Batch:
    """Return the traces, at least one, as a batch in this order, with the positions of their spans."""
    found = [find(trace) for trace in traces]
    return Batch(tuple(traces), {span: [one[span] for one in found] for span in found[0]})


def make_plan(
    model: Model,
    traces: Mapping[str, Trace],
    spans: Sequence[str],
    keeps: Mapping[str, Kept],
    *,
    dtype: torch.dtype = torch.float32,
    label: Callable[[Trace], str | None] | None = None,
    max_tokens: int | None = None,
    longest: int | None = None,
) -> Plan:
    """Choose the traces, find their spans and count the bytes.

    Args:
        model: the one that will read them.
        traces: by id.
        spans: that any recorder wants.
        keeps: quantities of all recorders.
        dtype: of kept means.
        label: of a trace's group, to keep one row per group and shard; None keeps one row per trace.
        max_tokens: longest trace to read, for the caller.
        longest: longest trace that the model reads.

    Raises:
        SteerError: a token id outside the vocabulary, or no trace left to read.
    """
    limit = min(max_tokens or math.inf, longest or math.inf)
    find = finder(model, spans)
    tally = _Tally(keeps, limit)

    def lines() -> Iterator[bytes]:
        for name in sorted(traces):
            trace = traces[name]
            _check_vocabulary(trace, model.anatomy.vocab)
            tally.take(trace, find(trace), None if label is None else label(trace), labelled=label is not None)
            yield trace_line(trace).encode()

    identity = digest(lines())
    if not tally.tokens:
        most = max(tally.dropped, key=lambda reason: tally.dropped[reason])
        raise SteerError(
            f"of {len(traces)} traces none can be read: {_listed(tally.dropped)}",
            f"traces with {' or '.join(spans) or 'tokens'}",
            REMEDIES.get(most, "Choose other traces"),
        )
    shards = tuple(cut(tally.tokens))
    groups = None if label is None else tally.labels
    return Plan(
        source=traces,
        find=find,
        shards=shards,
        shard_tokens=tuple(sum(tally.tokens[name] for name in shard.ids) for shard in shards),
        groups=groups,
        dropped=dict(sorted(tally.dropped.items())),
        unclosed=tally.unclosed,
        truncated=tally.truncated,
        plan_bytes=_bytes(shards, groups, keeps, tally, dtype),
        traces_hash=identity,
        keeps=keeps,
    )


@dataclass
class _Tally:
    """What is counted while traces go by: of those read their tokens and labels, of ragged quantities the parts."""

    keeps: Mapping[str, Kept]
    limit: float
    tokens: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    unclosed: int = 0
    truncated: int = 0

    def take(self, trace: Trace, where: Positions, label: str | None, labelled: bool) -> None:
        """Count a trace that is read, or why it is not; `labelled` says whether it needs a label."""
        reason = NO_GROUP if labelled and label is None else self._reason(trace, where)
        if reason is not None:
            self.dropped[reason] += 1
            return
        self.tokens[trace.id] = len(trace.tokens)
        if label is not None:
            self.labels[trace.id] = label
        self.unclosed += trace.closed is False
        self.truncated += trace.finish_reason == "length"
        for name, kept in self.keeps.items():
            self.parts[name] += kept.parts(0 if kept.span is None else len(where[kept.span]))

    def _reason(self, trace: Trace, where: Positions) -> str | None:
        """Why a trace cannot be read; None where it can."""
        if not trace.tokens:
            return EMPTY
        if not trace.prompt_length:
            return NO_PROMPT
        if len(trace.tokens) > self.limit:
            return TOO_LONG
        wanted = any(map(len, where.values())) or any(kept.span is None for kept in self.keeps.values())
        return None if wanted else NO_SPAN


def finder(model: Model, spans: Sequence[str]) -> Finder:
    """Return what finds the positions of these spans in a trace."""
    return lambda trace: {span: _compact(span_positions(span, trace, model.marks, model.tokenizer)) for span in spans}


def traces_hash(traces: Iterable[Trace]) -> str:
    """Return the hash of traces, whatever their order."""
    return digest(trace_line(trace).encode() for trace in sorted(traces, key=lambda trace: trace.id))


def _compact(positions: list[int]) -> Sequence[int]:
    """Return the same positions in little memory: a range where there is no gap."""
    if positions and positions[-1] - positions[0] == len(positions) - 1:
        return range(positions[0], positions[-1] + 1)
    return array("i", positions)


def _check_vocabulary(trace: Trace, vocabulary: int) -> None:
    worst = next((token for token in trace.tokens if not 0 <= token < vocabulary), None)
    if worst is not None:
        raise SteerError(
            f"trace {trace.id!r} has the token id {worst}",
            f"ids from 0, below {vocabulary}, this model's vocabulary",
            "Generate the traces with this model, or rebuild them from text with steer.traces.from_text",
        )


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def _bytes(
    shards: Sequence[Shard],
    groups: Mapping[str, str] | None,
    keeps: Mapping[str, Kept],
    tally: _Tally,
    dtype: torch.dtype,
) -> int:
    if groups is None:
        sizes = {name: math.prod(kept.shape) * (kept.dtype or dtype).itemsize for name, kept in keeps.items()}
        return sum(tally.parts[name] * size for name, size in sizes.items())
    rows = sum(len({groups[name] for name in shard.ids}) for shard in shards)
    return rows * sum(math.prod(kept.shape) * torch.float64.itemsize for kept in keeps.values())
