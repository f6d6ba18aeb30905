"""The one hook on a router: reads and writes of a layer's choice of experts, in the order of the sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.anatomy.modules import Places
from steer.anatomy.resolve import Anatomy
from steer.anatomy.router_check import prove_router
from steer.errors import SteerError
from steer.programs import Write
from steer.report import Tick
from steer.router_writes import LogitProgram, WeightProgram
from steer.routing import Chooser, Listener, Routing, chosen, returned

LogitReader = Callable[[str, int, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class RouterTap:
    """What happens at the router of one layer: first the logits, then the weights, then everybody who reads.

    Attributes:
        layer: counts from 0.
        logits, weights: the writes, or None.
        readers: are given the logits that the choice was made from, (batch, token, experts): as the router returned them,
            or, after a write, in the precision in which the choice was made.
        listeners: are given the choice.
    """

    layer: int
    logits: LogitProgram | None
    weights: WeightProgram | None
    readers: Sequence[LogitReader]
    listeners: Sequence[Listener]

    def __call__(self, output: Any, tick: Tick) -> Any:
        """Take what the router returned, and return what its block is to see.

        Raises:
            SteerError: the router returned something else than logits, weights and ids, one row per token of the pass.
        """
        flat = chosen(output, f"layer {self.layer}")
        if len(flat[0]) != tick.shape[0] * tick.shape[1]:
            raise SteerError(
                f"the router of layer {self.layer} saw {len(flat[0])} tokens in a pass over {tick.shape[0]} x {tick.shape[1]}",
                "every token of the pass, padding too",
                "Run the model with padded rows, not packed ones",
            )
        logits, weights, ids = (part.reshape(*tick.shape, part.shape[-1]) for part in flat)
        routing = Routing(ids, weights)
        if self.logits is not None:
            logits, routing = self.logits.write(logits, routing, tick)
        if self.weights is not None:
            routing = self.weights.write(routing, tick)
        for reader in self.readers:
            reader("router_logits", self.layer, logits, tick.states)
        for listener in self.listeners:
            listener(self.layer, routing, tick.states)
        if self.logits is not None:
            return returned(output, routing.weights, routing.ids, logits)
        return output if self.weights is None else returned(output, routing.weights)


class Routers:
    """The routers of one model, and what has been proven of them: every site of a layer once, before its first write."""

    def __init__(self, anatomy: Anatomy, places: Places) -> None:
        self.anatomy, self.places = anatomy, places
        self._proven: dict[tuple[int, str], Chooser | None] = {}

    def tap(
        self,
        layer: int,
        biases: Sequence[Write],
        scalings: Sequence[Write],
        readers: Sequence[LogitReader],
        listeners: Sequence[Listener],
    ) -> RouterTap:
        """Return all that happens at one router; nobody's hook of ours may be on the layer, since its block may run.

        Raises:
            SteerError: writes there would not have their effect, see `prove_router`.
        """
        chooser = self._prove(layer, "router_logits") if biases else None
        if scalings:
            self._prove(layer, "router")
        return RouterTap(
            layer,
            None if chooser is None else LogitProgram(layer, biases, chooser),
            WeightProgram(layer, scalings, self.anatomy.experts) if scalings else None,
            readers,
            listeners,
        )

    def _prove(self, layer: int, site: str) -> Chooser | None:
        if (layer, site) not in self._proven:
            dtype = next(self.places.embedding.parameters()).dtype
            self._proven[layer, site] = prove_router(self.places.layers[layer], self.anatomy, layer, site, dtype)
        return self._proven[layer, site]
