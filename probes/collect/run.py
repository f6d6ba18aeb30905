"""The pass itself: every trace once through the backbone, every recorder at once, one file a shard.

Shards are fixed (`steer.shards.cut`: sorted ids, 64 traces); within one, traces are batched by length under a budget of
tokens. A shard's rows depend on its own traces and on the options alone, and what joins shards is summed in their order,
so a run that was killed and resumed gives the bytes of one that was not. Seconds stay in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from probes.collect.job import BATCH_TOKENS, SITES, SPANS, Job, Options, prepare
from probes.collect.pass_ import read_shard
from probes.collect.plan import Plan
from probes.collect.recorders import Recorder
from probes.collect.store import FileShard, MemoryShard, ShardStore, write_shard
from probes.collect.summary import Summary
from probes.collect.summary_file import FILE
from steer import artifacts
from steer.errors import SteerError
from steer.shards import Journal, Shard
from steer.traces import Trace, Traces

if TYPE_CHECKING:
    from steer.model import SteerableModel


@dataclass(frozen=True)
class Progress:
    """Where a collection stands; the first one comes before the model runs.

    Attributes:
        plan: what will be done, with its bytes.
        shards, traces, tokens: done so far, resumed shards included.
        seconds: since the start.
    """

    plan: Plan
    shards: int = 0
    traces: int = 0
    tokens: int = 0
    seconds: float = 0.0


def collect(
    model: SteerableModel,
    traces: Traces | Iterable[Trace],
    out: str | Path | None = None,
    *,
    sites: Sequence[str] = SITES,
    spans: Sequence[str] = SPANS,
    layers: Sequence[int] | None = None,
    keep: Literal["trace", "group"] = "trace",
    groups: Mapping[str, str] | None = None,
    recorders: Sequence[Recorder] | None = None,
    dtype: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Read a model over traces and keep what the recorders keep.

    Args:
        model: read with its interventions active, if it is a view.
        traces: of this model's tokenizer.
        out: folder to write; None keeps everything in memory.
        sites: for the default recorders, `SpanMeans` and, where `z` is among the sites, `HeadMeans`.
        spans: over which they average.
        layers: numbers from 0; None: all.
        keep: one row per trace, or one per group and shard.
        groups: with `keep="group"`, id -> label; None takes each trace's own `group`.
        recorders: instead of the default ones.
        dtype: of kept means: float16, bfloat16, float32 or float64.
        batch_tokens: most tokens of a forward pass, padding included (one trace may be longer).
        max_tokens: longer traces are left out and counted.
        resume: go on with what `out` holds; a finished summary of the same options is returned as it is.
        progress: called with the plan first, then after every shard.

    Raises:
        SteerError: no traces, traces of another tokenizer, nothing to read, unknown options, `out` exists, or
            activations that are not finite (names layer and trace).
        OSError: the disk or the permissions refuse; finished shards stay, to be resumed.
    """
    if out is not None:
        check_out(Path(out), resume)
    options = Options(sites, spans, layers, keep, groups, recorders, dtype, batch_tokens, max_tokens)
    job = prepare(model, traces, options)
    if out is None:
        return Summary(job.meta, _run(job, None, None, progress))
    folder = Path(out)
    journal = Journal(folder / "journal", {**job.meta, "groups": job.plan.groups})
    if (folder / FILE).is_file():
        return Summary.load(folder)
    return Summary(job.meta, _run(job, folder, journal, progress)).finish(folder)


def check_out(folder: Path, resume: bool) -> None:
    """Refuse an output folder that exists, unless its work is to go on.

    Raises:
        SteerError: it exists and `resume` is false, or it is a file.
    """
    if folder.is_file() or (folder.exists() and not resume):
        raise SteerError(
            f"{folder} exists already",
            "a folder that does not exist yet",
            "Choose another name, remove it, or pass --resume to go on with an interrupted collection",
        )


def plan(model: SteerableModel, traces: Traces | Iterable[Trace], options: Options | None = None) -> Plan:
    """Return what `collect` with these options would do, without running the model; errors as there."""
    return prepare(model, traces, options or Options()).plan


def _run(
    job: Job, folder: Path | None, journal: Journal | None, progress: Callable[[Progress], None] | None
) -> list[ShardStore]:
    stores: list[ShardStore] = []
    began, traces, tokens = time.perf_counter(), 0, 0
    tell = progress or (lambda state: None)
    tell(Progress(job.plan))
    for shard in job.plan.shards:
        stores.append(_shard(job, shard, folder, journal))
        traces += len(shard.ids)
        tokens += sum(len(job.plan.traces[name].tokens) for name in shard.ids)
        tell(Progress(job.plan, len(stores), traces, tokens, time.perf_counter() - began))
    return stores


def _shard(job: Job, shard: Shard, folder: Path | None, journal: Journal | None) -> ShardStore:
    if folder is None or journal is None:
        return MemoryShard(*read_shard(job, shard))
    path = folder / f"shard-{shard.index:05d}.safetensors"
    if journal.has(shard) and path.is_file():
        return FileShard(path, journal.read(shard).decode())
    began = time.perf_counter()
    rows, tensors = read_shard(job, shard)
    story = artifacts.provenance(
        model=job.model.identity,
        data_hash=job.plan.traces_hash,
        data_count=len(rows),
        convention="one row per trace or group",
    )
    store = write_shard(path, rows, tensors, story)
    journal.write(shard, store.tensors_id.encode(), {"seconds": time.perf_counter() - began, "traces": len(shard.ids)})
    return store
