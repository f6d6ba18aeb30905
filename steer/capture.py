"""Captured activations: {site: {layer: value}} of the last forward pass, or of every one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.routing import Routing


class Capture(dict[str, dict[int, Any]]):
    """Values of the last forward pass; with `every`, of all passes in `forwards`, oldest first.

    A value is a tensor, at `router` a `Routing`.

    Args:
        every: keep all passes.
    """

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every = every
        self.forwards: list[dict[str, dict[int, Any]]] = []

    def take(self, site: str, layer: int, value: Tensor, states: Tensor | None) -> None:
        """Keep one value; a place seen twice means that another forward pass has begun."""
        self._keep(site, layer, value)

    def hear(self, layer: int, routing: Routing, states: Tensor | None) -> None:
        """Keep one choice of experts, as `take`."""
        self._keep("router", layer, routing)

    def _keep(self, site: str, layer: int, value: Tensor | Routing) -> None:
        if self.every:
            if not self.forwards or layer in self.forwards[-1].get(site, {}):
                self.forwards.append({})
            self.forwards[-1].setdefault(site, {})[layer] = value
        self.setdefault(site, {})[layer] = value
