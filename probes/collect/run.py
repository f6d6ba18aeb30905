"""The pass itself: every trace once through the backbone, every recorder at once, one file a shard.

Shards are fixed (`steer.shards.cut`: sorted ids, 64 traces); within one, traces are batched by length under a budget of
tokens. A shard's rows depend on its own traces and on the options alone, and what joins shards is summed in their order,
so a run that was killed and resumed, or shared by several processes, gives the bytes of one that was not. Seconds stay
in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from probes.collect.cache import open_cache
from probes.collect.job import BATCH_TOKENS, SITES, SPANS, Job, Options, prepare
from probes.collect.pass_ import read_shard
from probes.collect.plan import Plan
from probes.collect.progress import Meter, Progress
from probes.collect.reader import Reader
from probes.collect.recorders import Recorder
from probes.collect.rows import Row
from probes.collect.store import FileShard, MemoryShard, write_shard
from probes.collect.summary import Summary
from probes.collect.summary_file import FILE
from probes.collect.team import joined
from steer import artifacts
from steer.errors import SteerError
from steer.identity import UNKNOWN
from steer.shards import Journal, Shard
from steer.traces import Trace, Traces

if TYPE_CHECKING:
    from steer.model import SteerableModel

Done = Callable[[Shard], bool]
Keep = Callable[[Shard, tuple[Row, ...], Mapping[str, Tensor], float], None]


def collect(
    model: SteerableModel | Reader,
    traces: Traces | Iterable[Trace] | str | Path,
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
    cache: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Read a model over traces and keep what the recorders keep.

    Under `torchrun`, with `out` on a disk that all processes see, they share the shards: every process calls this with
    the same arguments, and each holds the whole model.

    Args:
        model: read with its interventions active, if it is a view; or another reader (`probes.collect.vllm`).
        traces: of this model's tokenizer; or the path of a run, which is then read line by line and never held.
        out: folder to write; None keeps everything in memory.
        sites: for the default recorders, `SpanMeans` and, where `z` is among the sites, `HeadMeans`.
        spans: over which they average.
        layers: numbers from 0; None: all.
        keep: one row per trace, or one per group and shard.
        groups: with `keep="group"`, id -> label; None takes each trace's own `group`.
        recorders: instead of the default ones.
        dtype: of kept means: float16, bfloat16, float32 or float64; sums over groups are always float64.
        batch_tokens: most tokens of a forward pass, padding included (one trace may be longer).
        max_tokens: longer traces are left out and counted.
        resume: go on with what `out` holds; a finished summary of the same options is returned as it is.
        cache: folder in which every recorder's part of every shard is kept, and looked for before the model runs; what
            was used is told to `progress`. None: neither.
        progress: called with the plan first, then after every shard.

    Raises:
        SteerError: no traces, traces of another tokenizer, nothing to read, unknown options, `out` exists, activations
            that are not finite (names layer and trace), or another process stopped (says why).
        OSError: the disk or the permissions refuse; finished shards stay, to be resumed.
    """
    folder = None if out is None else Path(out)
    options = Options(sites, spans, layers, keep, groups, recorders, dtype, batch_tokens, max_tokens)
    with joined(folder is not None) as team:
        if folder is not None and team.rank == 0:
            check_out(folder, resume)
        job = prepare(model, traces, options)
        known = None if cache is None else open_cache(Path(cache), job)
        if folder is None:
            return _in_memory(job, Meter(job.plan, known, team, progress))
        return _on_disk(job, folder, Meter(job.plan, known, team, progress))


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


def plan(
    model: SteerableModel | Reader, traces: Traces | Iterable[Trace] | str | Path, options: Options | None = None
) -> Plan:
    """Return what `collect` with these options would do, without running the model; errors as there."""
    return prepare(model, traces, options or Options()).plan


def _in_memory(job: Job, meter: Meter) -> Summary:
    stores: list[MemoryShard] = []
    _work(job, meter, lambda shard: False, lambda shard, rows, tensors, _: stores.append(MemoryShard(rows, tensors)))
    return Summary(job.meta, stores)


def _on_disk(job: Job, folder: Path, meter: Meter) -> Summary:
    engine = job.reader.engine
    key = {**job.meta, "groups": job.plan.groups, **({} if engine is None else {"engine": engine})}

    def begin() -> None:
        if UNKNOWN in job.reader.model.change_ids and (folder / "journal").is_dir():
            raise SteerError(
                "a Custom function has no fingerprint, so nobody can say whether it is the one the summary was begun with",
                "changes with a fingerprint",
                "Collect again into another folder",
            )
        _cleared(_begun(folder, key))

    meter.team.first(begin)
    if (folder / FILE).is_file():
        return Summary.load(folder)
    journal = _begun(folder, key)

    def path(shard: Shard) -> Path:
        return folder / f"shard-{shard.index:05d}.safetensors"

    def done(shard: Shard) -> bool:
        return journal.has(shard) and path(shard).is_file()

    def keep(shard: Shard, rows: tuple[Row, ...], tensors: Mapping[str, Tensor], seconds: float) -> None:
        story = artifacts.provenance(
            model=job.reader.model.identity,
            data_hash=job.plan.traces_hash,
            data_count=len(rows),
            convention="one row per trace or group",
            options=engine,
        )
        store = write_shard(path(shard), rows, tensors, story)
        journal.write(shard, store.tensors_id.encode(), {"seconds": seconds, "traces": len(shard.ids)})

    def finish() -> None:
        missing = [shard.index for shard in job.plan.shards if not done(shard)]
        if missing:
            raise SteerError(
                f"shard {missing[0]} is not in {folder}",
                "a folder that every process sees",
                "Put --out on a shared disk",
            )
        stores = [FileShard(path(shard), journal.read(shard).decode()) for shard in job.plan.shards]
        Summary(job.meta, stores).finish(folder)

    _work(job, meter, done, keep)
    meter.team.last(finish, meter.tell)
    return Summary.load(folder)


def _begun(folder: Path, key: Mapping[str, object]) -> Journal:
    return Journal(folder / "journal", key)


def _cleared(journal: Journal) -> None:
    """Remove what a killed process was writing; called before anybody writes."""
    for folder in (journal.folder, journal.folder.parent):
        for partial in folder.glob(".*.partial"):
            partial.unlink()


def _work(job: Job, meter: Meter, done: Done, keep: Keep) -> None:
    """Make the shards that fall to this process, each from the cache as far as it is there, else from the model."""
    meter.tell()
    for number in meter.team.take(len(job.plan.shards)):
        shard = job.plan.shards[number]
        if done(shard):
            meter.resumed(shard)
            continue
        began = time.perf_counter()
        entries = () if meter.cache is None else meter.cache.entries
        found = {entry: tensors for entry in entries if (tensors := entry.take(shard)) is not None}
        known = {id(entry.prepared) for entry in found}
        missing = [prepared for prepared in job.prepared if id(prepared) not in known]
        rows, tensors = read_shard(job, shard, missing)
        tensors = {**tensors, **{name: value for kept in found.values() for name, value in kept.items()}}
        keep(shard, rows, tensors, time.perf_counter() - began)
        damaged = 0
        for entry in entries:
            if entry not in found:
                damaged += entry.path(shard).is_file()
                entry.put(shard, tensors)
        meter.made(shard, tuple(entry.name for entry in found), damaged, read=bool(missing))
