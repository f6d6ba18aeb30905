"""Which experts a span's tokens are sent to: counts and weights per layer and expert (RICE, arXiv 2505.14681, §3).

K[l, e] = how many tokens of the span choose expert e in layer l, and the sum of the weights with which they do, after the
family's own normalisation and scaling (the weights of a token sum to 1 on most families, to 2.5 on DeepSeek V3, to less on
OLMoE). Experts go by their logical ids, the rows of the router's matrix. Both are sums: K over a marker's places is RICE's
k, K over `all` tokens its K, and K summed over experts and divided by the number of chosen experts its T (its M).

The choices are heard as the blocks see them (`SteerableModel.hear`), after every intervention that is in force, whoever came
first. Per layer they become one row of numbers per token and one batched matrix product sums them over every span; padding
weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.collect.reader import Shaped
from probes.collect.recorders import Batch, Kept, Layers, Pass, Prepared
from steer.errors import SteerError
from steer.routing import Routing
from steer.spans import check_span

if TYPE_CHECKING:
    from steer.model import SteerableModel

ALL = "all"
COUNT, WEIGHT = "router.count", "router.weight"


@dataclass(frozen=True)
class RouterCounts:
    """How often, and with what weight in sum, each expert is chosen in each span.

    `router.count/span` and `router.weight/span`, both (layer, expert) and added up over traces in groups.

    Attributes:
        spans: names of DESIGN §2, or `all` for every token of prompt and reply.
    """

    spans: tuple[str, ...] = (ALL, "thinking")
    name = "router_counts"

    def __post_init__(self) -> None:
        if not self.spans:
            raise SteerError("no span was asked for", f"at least one, or {ALL}")
        for span in self.spans:
            if span != ALL:
                check_span(span)

    def options(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return {"spans": list(self.spans)}

    def prepare(self, model: SteerableModel, layers: Layers) -> Prepared:
        """Return what it keeps, and how it hears the routers; errors as `kept`."""
        return replace(self.kept(model, layers), within=partial(_heard, model))

    def kept(self, model: Shaped, layers: Layers) -> Prepared:
        """Return what it keeps, for those of the layers that have experts.

        Raises:
            SteerError: the model, or every one of the layers, has no experts.
        """
        anatomy = model.anatomy
        having = tuple(layer for layer in layers if layer in anatomy.expert_layers)
        if anatomy.record.experts is None or not having:
            raise SteerError(
                f"the layers {list(layers)} of {model.name}, a {anatomy.family} model, have no experts to choose among",
                f"one of the layers {list(anatomy.expert_layers)}" if anatomy.expert_layers else "a model with experts",
                "Leave RouterCounts out, or name layers that have experts",
            )
        shape = (len(having), anatomy.experts)
        keeps = {}
        for span in self.spans:
            place = None if span == ALL else span
            keeps[f"{COUNT}/{span}"] = Kept(shape, having, place, "sum", torch.int32)
            keeps[f"{WEIGHT}/{span}"] = Kept(shape, having, place, "sum", torch.float32)
        named = tuple(span for span in self.spans if span != ALL)
        return Prepared({}, named, keeps, lambda batch: _RouterPass(batch, self.spans, having, anatomy.experts))


def _heard(model: SteerableModel, one: Pass) -> AbstractContextManager[None]:
    """Hear the routers of a pass while the context is open."""
    assert isinstance(one, _RouterPass)
    return model.hear(one.take, one.layers)


class _RouterPass:
    """The routers' choices during one forward pass."""

    def __init__(self, batch: Batch, spans: tuple[str, ...], layers: Layers, experts: int) -> None:
        self.batch, self.spans, self.layers, self.experts = batch, spans, layers, experts
        self.sums: dict[int, Tensor] = {}
        self._moved: dict[torch.device, Tensor] = {}

    def take(self, layer: int, routing: Routing, states: Tensor | None) -> None:
        """Add up one layer's choices over the tokens of every span."""
        ids = routing.ids
        rows = torch.zeros(*ids.shape[:2], 2 * self.experts, dtype=torch.float32, device=ids.device)
        rows.scatter_(2, ids, 1.0)
        rows.scatter_(2, ids + self.experts, routing.weights.float())
        self.sums[layer] = torch.bmm(self._inside(ids.device), rows)

    def _inside(self, device: torch.device) -> Float[Tensor, "trace span token"]:
        """One where a token of a trace lies in a span."""
        if device not in self._moved:
            table = np.zeros((len(self.batch.traces), len(self.spans), self.batch.tokens), dtype=np.float32)
            for row, trace in enumerate(self.batch.traces):
                for column, span in enumerate(self.spans):
                    places = range(len(trace.tokens)) if span == ALL else self.batch.positions[span][row]
                    table[row, column, np.asarray(places, dtype=np.int64)] = 1.0
            self._moved[device] = torch.from_numpy(table).to(device)
        return self._moved[device]

    def observe(self, site: str, layer: int, value: Tensor) -> None:
        """Nothing: it reads no site."""

    def rows(self, final: Sequence[Float[Tensor, "_ hidden"]]) -> dict[str, Tensor]:
        """Return (trace, layer, expert) per span, counts as whole numbers.

        Raises:
            SteerError: a router was not called.
        """
        missing = [layer for layer in self.layers if layer not in self.sums]
        if missing:
            raise SteerError(
                f"the router of layer {missing[0]} was not called in the pass",
                "experts chosen by the module that the anatomy names",
                "Correct `experts: router` in a copy of the record and give it with anatomy=FILE",
            )
        first = self.sums[self.layers[0]].device
        sums = torch.stack([self.sums[layer].to(first) for layer in self.layers], dim=2).cpu()
        counts, weights = torch.split(sums, self.experts, dim=-1)
        found = {}
        for column, span in enumerate(self.spans):
            found[f"{COUNT}/{span}"] = counts[:, column].round().int()
            found[f"{WEIGHT}/{span}"] = weights[:, column].contiguous()
        return found
