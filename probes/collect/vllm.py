"""Reading with vLLM: means over spans and choices of experts, into the same summaries.

    recorders = (SpanMeans(("resid_post",), ("thinking",)),)
    with SteeredLLM("organism:chain", capture=places(recorders, Known.of("organism:chain"))) as llm:
        collect(VllmReader(llm), run, out="summary", recorders=recorders)

Traces go through the engine as prompts, with chunked prefill and as many at a time as it runs; their sums are drawn on
its workers (`steer.backends.vllm.capture`) and divided here. Segments, heads, attention and next-token statistics need
what is not kept there; the HF back end reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.collect.means import HeadMeans, SpanMeans
from probes.collect.reader import Shaped
from probes.collect.recorders import Batch, Kept, Layers, Prepared, Recorder
from probes.collect.routing import ALL, COUNT, WEIGHT, RouterCounts
from steer.backends.vllm.capture import ROUTER, SITES, Place, Taken, Wanted, ranges_of
from steer.errors import SteerError
from steer.identity import UNKNOWN
from steer.ranges import ranges

if TYPE_CHECKING:
    from steer.backends.vllm.llm import SteeredLLM

REMEDY = "Read it with the HF back end: leave vllm: and --backend vllm out"


@dataclass(frozen=True, eq=False)
class VllmReader:
    """Reads traces with an engine, under the changes of a view of it; a `probes.collect.reader.Reader`."""

    model: SteeredLLM

    @property
    def engine(self) -> dict[str, Any]:
        """Name and version of the engine, and how it runs."""
        return self.model.backend

    @property
    def longest(self) -> int:
        """One less than the engine's longest sequence, since it writes a token behind every prompt."""
        return self.model.longest - 1

    def prepare(self, recorder: Recorder, layers: Layers) -> Prepared:
        """Return the recorder, knowing the model.

        Raises:
            SteerError: vLLM cannot record it, or the engine was not started to read its places.
        """
        prepared = prepare(recorder, self.model, layers)
        missing = sorted(set(_places(prepared)) - set(self.model.declared.capture))
        if missing:
            site = missing[0][0]
            told = ranges([layer for at, layer in self.model.declared.capture if at == site])
            raise SteerError(
                f"{site} of layers {ranges([layer for at, layer in missing if at == site])} is to be read",
                f"layers {told}, for which the engine was started"
                if told
                else "a site for which the engine was started",
                "Start it with all that is to be read (capture=)",
            )
        return prepared

    def read(self, prepared: Sequence[Prepared], batch: Batch) -> dict[str, list[Tensor]]:
        """Return every quantity: one tensor per trace, on the CPU; errors as `SteeredLLM.read`."""
        keeps = {name: kept for one in prepared for name, kept in one.keeps.items()}
        means, counts = _spans(keeps, SITES), _spans(keeps, (COUNT, WEIGHT))
        wanted = [
            Wanted(
                len(trace.tokens),
                trace.prompt_length,
                tuple(ranges_of(_positions(batch, row, span)) for span in means),
                tuple(ranges_of(_positions(batch, row, span)) for span in counts),
            )
            for row, trace in enumerate(batch.traces)
        ]
        taken = self.model.read(batch.traces, wanted)
        return {
            name: [_value(name, kept, one, means, counts, batch, row) for row, one in enumerate(taken)]
            for name, kept in keeps.items()
        }

    def key(self) -> dict[str, Any] | None:
        """Return what says which numbers the engine computes; None where the hash of its weights is not known."""
        identity = self.model.identity
        if identity.weights_id == UNKNOWN:
            return None
        return {
            "shape_id": identity.shape_id,
            "tokenizer_id": identity.tokenizer_id,
            "weights": f"files {identity.weights_id}",
            "marks": self.model.marks.to_dict(),
            "changes": list(self.model.change_ids),
            "engine": self.engine,
        }


def prepare(recorder: Recorder, model: Shaped, layers: Layers) -> Prepared:
    """Return a recorder that vLLM can run, knowing the model.

    Raises:
        SteerError: it cannot, or the model has no such site.
    """
    if isinstance(recorder, RouterCounts):
        return recorder.kept(model, layers)
    if isinstance(recorder, HeadMeans):
        raise SteerError(
            "vLLM cannot read z", f"sites among {', '.join(SITES)}", f"Leave z out (--sites resid_mid). {REMEDY}"
        )
    if not isinstance(recorder, SpanMeans):
        raise SteerError(f"vLLM cannot record {recorder.name}", "span_means or router_counts", REMEDY)
    others = [site for site in recorder.sites if site not in SITES]
    if others:
        raise SteerError(f"vLLM cannot read {others[0]}", f"sites among {', '.join(SITES)}", REMEDY)
    return recorder.prepare(model, layers)


def places(recorders: Sequence[Recorder], model: Shaped, layers: Sequence[int] | None = None) -> tuple[Place, ...]:
    """Return what an engine must be started to read for these recorders; errors as `prepare`."""
    chosen = tuple(range(model.anatomy.layers)) if layers is None else tuple(sorted(set(layers)))
    return tuple(sorted({place for each in recorders for place in _places(prepare(each, model, chosen))}))


def _places(prepared: Prepared) -> list[Place]:
    found = []
    for name, kept in prepared.keeps.items():
        what = name.partition("/")[0]
        found += [(ROUTER if what in (COUNT, WEIGHT) else what, layer) for layer in kept.layers or ()]
    return found


def _spans(keeps: dict[str, Kept], what: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[2] for name in keeps if name.partition("/")[0] in what))


def _positions(batch: Batch, row: int, span: str) -> Sequence[int]:
    return range(len(batch.traces[row].tokens)) if span == ALL else batch.positions[span][row]


def _value(name: str, kept: Kept, taken: Taken, means: list[str], counts: list[str], batch: Batch, row: int) -> Tensor:
    """Return one quantity of one trace, as the recorder itself would."""
    what, _, span = name.partition("/")
    layers = kept.layers or ()
    if what in (COUNT, WEIGHT):
        rows = torch.stack([taken.counts[layer][counts.index(span)] for layer in layers])
        experts = kept.shape[-1]
        return rows[:, :experts].round().int() if what == COUNT else rows[:, experts:].float()
    number = max(1, len(_positions(batch, row, span)))
    return torch.stack([taken.sums[what, layer][means.index(span)] / number for layer in layers]).float()
