"""Which experts the tokens of replies go to, kept while `model.generate` writes them, so that counting needs no second pass.

    with model.routed() as routes:
        traces = model.generate(questions)
    routes[traces[0]]                       # (token, layer, chosen), as vLLM's `routed_experts`

A prompt is read once for all its replies. A reply's last token is never read, so a trace of T tokens has T - 1 rows. What was
heard stays on the device for `KEPT` steps and then moves to memory: 2 bytes per token, layer and chosen expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int, Int16
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import SteerError
from steer.routing import Routing
from steer.trace import Trace

KEPT = 64
Key = tuple[str, int]
"""Question and sample."""


class Routes:
    """The routed experts of every reply that is written while it listens; made by `model.routed()`.

    Attributes:
        layers: that have experts, increasing: the second axis of what it returns.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._heard: dict[int, Int[Tensor, "row token chosen"]] = {}
        self._prompts: dict[str, NDArray[np.int16]] = {}
        self._parts: dict[Key, list[NDArray[np.int16]]] = {}
        self._waiting: list[tuple[list[Key | None], Int16[Tensor, "row layer chosen"]]] = []

    def hear(self, layer: int, routing: Routing, states: Tensor | None) -> None:
        """Keep one layer's choices until the batch says whose they are (a `steer.routing.Listener`)."""
        self._heard[layer] = routing.ids

    def begin(self, keys: Sequence[Key], prompts: Sequence[str], mask: Bool[Tensor, "row column"]) -> None:
        """Take what was heard for the prompts of new replies, one row each.

        Raises:
            SteerError: a reply was written before.
        """
        for key in keys:
            if key in self._parts:
                raise SteerError(f"the reply {key[0]}/{key[1]} was written before", "each once", "Open `model.routed()` anew to generate again")  # fmt: skip
            self._parts[key] = []
        ids = self._now().cpu().numpy()
        for row, (prompt, real) in enumerate(zip(prompts, mask.cpu().numpy(), strict=True)):
            self._prompts[prompt] = ids[row][real]

    def step(self, keys: list[Key | None]) -> None:
        """Take what was heard for one more token of each reply; None for rows whose reply has ended."""
        self._waiting.append((keys, self._now()[:, 0]))
        if len(self._waiting) >= KEPT:
            self._move()

    def _now(self) -> Int16[Tensor, "row token layer chosen"]:
        missing = [layer for layer in self.layers if layer not in self._heard]
        if missing:
            raise SteerError(
                f"the router of layer {missing[0]} was not called while a reply was written",
                "routers that are called as modules",
                "Load with use_kernels=False, or read the finished traces with probes.collect",
            )
        first = self._heard[self.layers[0]].device
        found = torch.stack([self._heard[layer].to(first, torch.int16) for layer in self.layers], dim=2)
        self._heard.clear()
        return found

    def _move(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat([ids for _, ids in self._waiting]).cpu().numpy()
        keys = [key for each, _ in self._waiting for key in each]
        places: dict[Key, list[int]] = {}
        for place, key in enumerate(keys):
            if key is not None:
                places.setdefault(key, []).append(place)
        for key, those in places.items():
            self._parts[key].append(rows[those])
        self._waiting.clear()

    def __getitem__(self, trace: Trace) -> NDArray[np.int16]:
        """Return the chosen experts of a trace, (token, layer, chosen): of all its tokens but the last.

        Raises:
            SteerError: the trace was not written while this listened, or another was under its name.
        """
        self._move()
        key = (trace.item, trace.sample)
        if key not in self._parts:
            raise SteerError(f"the reply {trace.id} was not written inside `model.routed()`", "one that was")
        found = np.concatenate([self._prompts[trace.item], *self._parts[key]])
        if len(found) != len(trace.tokens) - 1:
            raise SteerError(
                f"the reply {trace.id} has {len(trace.tokens)} tokens, and {len(found)} were read under its name inside `model.routed()`",
                f"{len(trace.tokens) - 1}, all but the last",
                "Ask with the traces that were written there; one that was interrupted has to be written again",
            )
        return found
