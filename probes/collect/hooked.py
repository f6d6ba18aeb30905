"""Reading with hooks: a batch of traces through the backbone of a transformers model, every recorder at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probes.collect.cache_key import model_key
from probes.collect.recorders import Batch, Layers, Pass, Prepared, Recorder
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.model import SteerableModel


@dataclass(frozen=True, eq=False)
class HookReader:
    """Reads a loaded model with its interventions active; a `probes.collect.reader.Reader` for every recorder."""

    model: SteerableModel
    engine = None

    @property
    def longest(self) -> int | None:
        """How many positions the configuration allows."""
        return self.model.longest

    def prepare(self, recorder: Recorder, layers: Layers) -> Prepared:
        """Return the recorder, knowing the model; errors as `Recorder.prepare`."""
        return recorder.prepare(self.model, layers)

    def read(self, prepared: Sequence[Prepared], batch: Batch) -> dict[str, list[Tensor]]:
        """Return every recorder's rows; see `read_batch`."""
        return read_batch(self.model, prepared, batch)

    def key(self) -> dict[str, Any] | None:
        """Return what says which numbers this model computes; see `probes.collect.cache_key`."""
        return model_key(self.model)


def read_batch(model: SteerableModel, prepared: Sequence[Prepared], batch: Batch) -> dict[str, list[Tensor]]:
    """Run the backbone once over a batch and return every recorder's rows, one tensor per trace, on the CPU."""
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

    with ExitStack() as stack:
        stack.enter_context(model.read(callback, reads))
        for one, taking in zip(prepared, passes, strict=True):
            if one.within is not None:
                stack.enter_context(one.within(taking))
        final = model.run(
            [trace.tokens for trace in batch.traces],
            [trace.prompt_length for trace in batch.traces],
            [trace.generation_prompt_start for trace in batch.traces],
            head=False,
        )
    rows: dict[str, list[Tensor]] = {}
    for one, taking in zip(prepared, passes, strict=True):
        found = taking.rows(final)
        missing = [name for name in one.keeps if name not in found]
        if missing:
            raise SteerError(
                f"a recorder returned no {missing[0]}", "all that it said in `prepare`", "Correct the recorder"
            )
        for key, values in found.items():
            rows[key] = list(values.cpu()) if isinstance(values, Tensor) else [value.cpu() for value in values]
    return rows
