"""The one hook on a router: reads and writes of a layer's choice of experts, in the order of the sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.errors import SteerError
from steer.report import Tick
from steer.router_writes import LogitProgram, WeightProgram
from steer.routing import Listener, Routing, chosen, returned


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
    readers: tuple[Callable[[str, int, Tensor, Tensor | None], None], ...]
    listeners: tuple[Listener, ...]

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
        if self.logits is None and self.weights is None:
            return output
        return returned(output, logits, routing.weights, routing.ids)
