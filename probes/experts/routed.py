"""A summary of routed ids that an engine reported, such as vLLM's `enable_return_routed_experts`: no model is run here.

An engine reports the experts of every token that it read: of prompt and reply, but for the last token where the reply
ended with it, since nothing had to be computed from it. That token is then not counted, and T is one less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.collect.plan import traces_hash
from probes.collect.recorders import Kept, Layers
from probes.collect.routing import ALL, COUNT
from probes.collect.rows import Row, row_of
from probes.collect.run import check_out
from probes.collect.store import MemoryShard, ShardStore, write_shard
from probes.collect.summary import Summary
from probes.collect.summary_file import KIND, describe
from probes.experts.counts import MARKERS, recorder_for
from steer import artifacts
from steer.errors import SteerError
from steer.identity import ModelIdentity
from steer.marks import Marks
from steer.shards import cut
from steer.spans import span_positions
from steer.traces import Trace


def from_routed(
    traces: Iterable[Trace],
    routed: Iterable[NDArray[Any]],
    layers: Sequence[int],
    *,
    experts: int,
    tokenizer: Any,
    model: ModelIdentity,
    markers: Mapping[str, float] = MARKERS,
    out: str | Path | None = None,
) -> Summary:
    """Count routed experts as `collect` with `recorder_for(markers)` does; the sums of weights are left out.

    Args:
        traces: what the engine read and wrote, by this model's tokenizer.
        routed: of each trace the ids, (token, layer, chosen); one row per token of prompt and reply, or one less.
        layers: the model's layer numbers along the second axis, increasing; those with experts.
        experts: how many a layer has.
        tokenizer: finds the markers.
        model: what was run (`SteerableModel.identity`).
        markers: as for `expert_scores`.
        out: folder to write; None keeps the summary in memory.

    Raises:
        SteerError: no traces, another number of arrays, layers that do not increase, ids of another shape, outside the
            experts or twice at one token, traces that chose different numbers of experts, or `out` exists.
    """
    spans = recorder_for(markers).spans
    found: dict[str, tuple[Row, dict[str, torch.Tensor]]] = {}
    given, arrays, tokens = list(traces), list(routed), 0
    _check_given(given, arrays, layers)
    for trace, ids in zip(given, arrays, strict=True):
        chosen = _chosen(trace, np.asarray(ids), layers, experts)
        tokens += len(chosen)
        places = {ALL: list(range(len(chosen)))} | {
            span: [at for at in span_positions(span, trace, Marks(), tokenizer) if at < len(chosen)]
            for span in spans[1:]
        }
        counts = {f"{COUNT}/{span}": torch.from_numpy(chosen[where].sum(0)).int() for span, where in places.items()}
        found[trace.id] = row_of(trace, {span: places[span] for span in spans[1:]}), counts
    meta = _meta(given, tokens, tuple(layers), experts, spans, model)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder, resume=False)
    stores: list[ShardStore] = []
    for shard in cut(trace.id for trace in given):
        rows, parts = tuple(found[name][0] for name in shard.ids), [found[name][1] for name in shard.ids]
        tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        story = artifacts.provenance(model=model, data_hash=meta["traces"]["hash"], data_count=len(rows))
        file = None if folder is None else folder / f"shard-{shard.index:05d}.safetensors"
        stores.append(MemoryShard(rows, tensors) if file is None else write_shard(file, rows, tensors, story))
    summary = Summary(meta, stores)
    return summary if folder is None else summary.finish(folder)


def _check_given(given: Sequence[Trace], arrays: Sequence[NDArray[Any]], layers: Sequence[int]) -> None:
    if not given or len(given) != len(arrays):
        raise SteerError(f"{len(given)} traces were given with {len(arrays)} arrays of routed experts", "one array per trace, at least one")  # fmt: skip
    if any(before >= layer for before, layer in zip((-1, *layers), layers, strict=False)):
        raise SteerError(f"the layers {list(layers)} were given", "the model's layer numbers, increasing", "Name those with experts")  # fmt: skip
    numbers = sorted({np.shape(ids)[-1] for ids in arrays if np.ndim(ids) == 3})
    if len(numbers) > 1:
        raise SteerError(f"tokens of these traces chose {numbers} experts", "the same number for every token", "Give arrays of one model")  # fmt: skip


def _chosen(trace: Trace, ids: NDArray[Any], layers: Sequence[int], experts: int) -> NDArray[np.bool_]:
    """Return (token, layer, expert), whether it was chosen."""
    lengths = (len(trace.tokens), len(trace.tokens) - 1)
    if ids.ndim != 3 or ids.shape[0] not in lengths or ids.shape[1] != len(layers) or not 1 <= ids.shape[2] <= experts:
        raise SteerError(
            f"the routed experts of trace {trace.id!r} have shape {ids.shape}",
            f"({lengths[0]} or {lengths[1]} tokens, {len(layers)} layers, chosen experts)",
            "Give the experts of prompt and reply, for the layers that are named",
        )
    if not ids.size:
        return np.zeros((*ids.shape[:2], experts), dtype=bool)  # Nothing was read of a trace of one token.
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= experts:
        raise SteerError(
            f"the routed experts of trace {trace.id!r} go from {ids.min()} to {ids.max()}",
            f"whole numbers from 0 to {experts - 1}",
            "Give logical ids, before an engine's own placement of experts; leave out what it did not compute itself",
        )
    chosen = np.zeros((*ids.shape[:2], experts), dtype=bool)
    np.put_along_axis(chosen, ids.astype(np.int64), True, axis=2)
    if (chosen.sum(2) != ids.shape[2]).any():
        raise SteerError(f"a token of trace {trace.id!r} chose one expert twice", "different experts", "Give the ids as they were chosen")  # fmt: skip
    return chosen


def _meta(
    traces: Sequence[Trace], tokens: int, layers: Layers, experts: int, spans: Sequence[str], model: ModelIdentity
) -> dict[str, Any]:
    shape = (len(layers), experts)
    keeps = {f"{COUNT}/{span}": Kept(shape, layers, None if span == ALL else span, "sum") for span in spans}
    return {
        "format_version": artifacts.FORMAT_VERSION,
        "kind": KIND,
        "code_version": artifacts.code_version(),
        "model": model.to_dict(),
        "changes": [],
        "traces": {
            "hash": traces_hash(traces),
            "given": len(traces),
            "read": len(traces),
            "tokens": tokens,
            "dropped": {},
            "unclosed": sum(trace.closed is False for trace in traces),
            "truncated": sum(trace.finish_reason == "length" for trace in traces),
            "max_tokens": None,
        },
        "recorders": [{"name": "routed", "spans": list(spans)}],
        "layers": list(layers),
        "keep": "trace",
        "dtype": "float32",
        "batch_tokens": 0,
        "plan_bytes": len(traces) * len(keeps) * shape[0] * shape[1] * 4,
        "quantities": {name: describe(kept) for name, kept in keeps.items()},
    }
