"""One shard: its traces through the model in batches, and what becomes of the recorders' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from probes.collect.job import DTYPES, Job
from probes.collect.recorders import Batch, Kept, Prepared
from probes.collect.rows import Row, group_of, row_of
from steer.errors import SteerError
from steer.shards import Shard


def read_shard(
    job: Job, shard: Shard, which: Sequence[Prepared] | None = None
) -> tuple[tuple[Row, ...], dict[str, Tensor]]:
    """Read the traces of a shard and return its rows with their tensors, on the CPU.

    Args:
        job: what to read.
        shard: of its plan.
        which: the recorders of the job to run; None: all. Without any, the model does not run.

    Raises:
        SteerError: an activation is not finite, or too large for the dtype that is to be kept.
    """
    wanted = job.prepared if which is None else which
    found: dict[str, dict[str, Tensor]] = {}
    known: dict[str, Row] = {}
    for batch in job.plan.batches(shard, job.options.batch_tokens):
        ids = [trace.id for trace in batch.traces]
        for place, trace in enumerate(batch.traces):
            known[trace.id] = row_of(trace, {span: where[place] for span, where in batch.positions.items()})
        for key, values in (job.reader.read(wanted, batch) if wanted else {}).items():
            _check(key, values, batch, job.plan.keeps)
            found.setdefault(key, {}).update(zip(ids, values, strict=True))
    rows = tuple(known[name] for name in shard.ids)
    joined = {key: _joined([values[row.id] for row in rows], job.plan.keeps[key]) for key, values in found.items()}
    if job.plan.groups is None:
        return rows, {key: _narrowed(key, values, job) for key, values in joined.items()}
    return _grouped(rows, joined, job.plan.groups)


def _joined(values: Sequence[Tensor], kept: Kept) -> Tensor:
    """Return the rows of all traces as one tensor; parts follow each other, their counts are in the rows."""
    return torch.stack(list(values)) if kept.every is None else torch.cat(list(values))


def _grouped(
    rows: Sequence[Row], joined: Mapping[str, Tensor], groups: Mapping[str, str]
) -> tuple[tuple[Row, ...], dict[str, Tensor]]:
    """Return the sums over the traces of each group, in float64."""
    labels = sorted({groups[row.id] for row in rows})
    places = torch.tensor([labels.index(groups[row.id]) for row in rows])
    members = [
        [row for row, place in zip(rows, places.tolist(), strict=True) if place == index]
        for index in range(len(labels))
    ]
    sums = {
        key: values.new_zeros(len(labels), *values.shape[1:], dtype=torch.float64).index_add_(
            0, places, values.double()
        )
        for key, values in joined.items()
    }
    return tuple(group_of(label, part) for label, part in zip(labels, members, strict=True)), sums


def _check(key: str, values: Sequence[Tensor], batch: Batch, keeps: Mapping[str, Kept]) -> None:
    """Refuse rows that are not what the recorder said it keeps, or not finite."""
    if key not in keeps:
        raise SteerError(
            f"a recorder returned {key}", f"what it said in `prepare`, of {', '.join(keeps)}", "Correct the recorder"
        )
    kept = keeps[key]
    for place, (trace, value) in enumerate(zip(batch.traces, values, strict=True)):
        wanted = kept.shape
        if kept.every is not None and kept.span is not None:
            wanted = (kept.parts(len(batch.positions[kept.span][place])), *wanted)
        if tuple(value.shape) != wanted:
            raise SteerError(
                f"a recorder returned {key} of trace {trace.id!r} with the shape {tuple(value.shape)}",
                f"{wanted}, as it said in `prepare`",
                "Correct the recorder",
            )
        if not bool(torch.isfinite(value).all()):
            raise _not_finite(key, value, trace.id, kept)


def _not_finite(key: str, value: Tensor, name: str, kept: Kept) -> SteerError:
    """Return the error that names the trace, and where they are known the part and the layer that come first."""
    parts = value if kept.every is not None else value[None]
    part = _first(~torch.isfinite(parts.reshape(len(parts), -1)).all(1))
    where = "" if kept.every is None else f" in part {part}"
    if kept.layers is not None:
        layers = parts[part].reshape(len(kept.layers), -1)
        where += f" in layer {kept.layers[_first(~torch.isfinite(layers).all(1))]}"
    return SteerError(
        f"in trace {name!r} the mean {key} is NaN or infinite{where}",
        "finite activations",
        "Load the model in float32 or bfloat16, or leave that trace out",
    )


def _first(where: Tensor) -> int:
    return int(where.int().argmax())


def _narrowed(key: str, values: Tensor, job: Job) -> Tensor:
    dtype = job.plan.keeps[key].dtype or DTYPES[job.options.dtype]
    narrow = values.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise SteerError(
            f"the mean {key} reaches {float(values.abs().max()):.3g}",
            f"values below {torch.finfo(dtype).max:.3g}, the largest {dtype}",
            "Keep bfloat16 or float32",
        )
    return narrow
