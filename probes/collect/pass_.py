"""One shard: its traces through the backbone in batches, and what becomes of the recorders' rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probes.collect.job import DTYPES, Job
from probes.collect.recorders import Batch, Layers, Pass, Prepared
from probes.collect.rows import Row, group_of, row_of
from steer.errors import SteerError
from steer.shards import Shard

if TYPE_CHECKING:
    from steer.model import SteerableModel


def read_shard(job: Job, shard: Shard) -> tuple[tuple[Row, ...], dict[str, Tensor]]:
    """Read the traces of a shard and return its rows with their tensors, on the CPU.

    Raises:
        SteerError: an activation is not finite, or too large for the dtype that is to be kept.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for batch in job.plan.batches(shard, job.options.batch_tokens):
        for key, values in read_batch(job.model, job.prepared, batch).items():
            _check_finite(key, values, batch, job)
            found.setdefault(key, {}).update(zip((trace.id for trace in batch.traces), values, strict=True))
    rows = tuple(row_of(job.plan.traces[name], job.plan.positions[name]) for name in shard.ids)
    stacked = {key: torch.stack([values[row.id] for row in rows]) for key, values in found.items()}
    if job.plan.groups is None:
        return rows, {key: _narrowed(key, values, job) for key, values in stacked.items()}
    labels = sorted({job.plan.groups[row.id] for row in rows})
    places = torch.tensor([labels.index(job.plan.groups[row.id]) for row in rows])
    members = [
        [row for row, place in zip(rows, places.tolist(), strict=True) if place == index]
        for index in range(len(labels))
    ]
    sums = {
        key: values.new_zeros(len(labels), *values.shape[1:], dtype=torch.float64).index_add_(
            0, places, values.double()
        )
        for key, values in stacked.items()
    }
    return tuple(group_of(label, part) for label, part in zip(labels, members, strict=True)), sums


def read_batch(model: SteerableModel, prepared: Sequence[Prepared], batch: Batch) -> dict[str, Tensor]:
    """Run the backbone once over a batch and return every recorder's rows, on the CPU."""
    passes: list[Pass] = [one.start(batch) for one in prepared]
    reads: dict[str, Layers] = {}
    for one in prepared:
        for site, layers in one.reads.items():
            reads[site] = tuple(sorted({*reads.get(site, ()), *layers}))
    wants = [{site: frozenset(layers) for site, layers in one.reads.items()} for one in prepared]

    def callback(site: str, layer: int, value: Tensor, states: Tensor | None) -> None:
        for wanted, taking in zip(wants, passes, strict=True):
            if layer in wanted.get(site, ()):
                taking.observe(site, layer, value)

    with model.read(callback, reads):
        final = model.run(
            [trace.tokens for trace in batch.traces],
            [trace.prompt_length for trace in batch.traces],
            [trace.generation_prompt_start for trace in batch.traces],
            head=False,
        )
    rows: dict[str, Tensor] = {}
    for taking in passes:
        rows.update({key: value.cpu() for key, value in taking.rows(final).items()})
    return rows


def _check_finite(key: str, values: Tensor, batch: Batch, job: Job) -> None:
    wrong = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
    if not bool(wrong.any()):
        return
    row = int(wrong.int().argmax())
    kept = job.plan.keeps[key]
    where = ""
    if kept.layers is not None:
        places = (~torch.isfinite(values[row].flatten(1)).all(1)).int()
        where = f" in layer {kept.layers[int(places.argmax())]}"
    raise SteerError(
        f"in trace {batch.traces[row].id!r} the mean {key} is NaN or infinite{where}",
        "finite activations",
        "Load the model in float32 or bfloat16, or leave that trace out",
    )


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
