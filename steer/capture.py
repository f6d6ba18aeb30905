"""Captured activations: {site: {layer: tensor}} of the last forward pass, or of every one."""

from __future__ import annotations

from torch import Tensor


class Capture(dict[str, dict[int, Tensor]]):
    """Values of the last forward pass; with `every`, of all passes in `forwards`, oldest first.

    Args:
        every: keep all passes.
    """

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every = every
        self.forwards: list[dict[str, dict[int, Tensor]]] = []

    def take(self, site: str, layer: int, value: Tensor, states: Tensor | None) -> None:
        """Keep one value; a place seen twice means that another forward pass has begun."""
        if self.every:
            if not self.forwards or layer in self.forwards[-1].get(site, {}):
                self.forwards.append({})
            self.forwards[-1].setdefault(site, {})[layer] = value
        self.setdefault(site, {})[layer] = value
