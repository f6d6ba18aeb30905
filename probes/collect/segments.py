"""Means of activations over segments of a span: what the latent trajectory of a thought is made of (arXiv 2510.10494).

A span of n positions is cut, in order, into ceil(n / every) segments of `every` positions, the last one of what is left;
for each, site and layer the mean is kept. The official code takes every=500, and as last layer the state after the final
norm (its `hidden_states[-1]`), which `final=True` keeps beside the layers' own outputs.

Positions are brought into the order of the segments by one gather and averaged by one batched matrix product per site and
layer, in float32 whatever the model's dtype (a bfloat16 mean of 500 tokens errs by 4e-3 on unit-scale data); no trace's
full activations are kept. `every=1` keeps each position's own value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from probes.collect.means import layers_with, width
from probes.collect.recorders import Batch, Kept, Layers, Prepared
from steer.errors import SteerError
from steer.sites import site as known_site
from steer.spans import check_span

if TYPE_CHECKING:
    from steer.model import SteerableModel

FINAL = "final"
EVERY = 500


def segment_quantity(site: str, span: str, every: int) -> str:
    """Return the name under which segments of a span are kept, such as `resid_post/thinking/500`."""
    return f"{site}/{span}/{every}"


@dataclass(frozen=True)
class SegmentMeans:
    """Mean over each segment of a span, at each site and layer; `site/span/every`, parts of (layer, hidden).

    Attributes:
        sites: names of `steer.sites`, readable ones.
        span: a name of DESIGN §2.
        every: positions of a segment.
        final: whether to keep the backbone's output after the final norm as well, as `final/span/every`, parts of (hidden,).
    """

    sites: tuple[str, ...] = ("resid_post",)
    span: str = "thinking"
    every: int = EVERY
    final: bool = False
    name = "segment_means"

    def __post_init__(self) -> None:
        check_span(self.span)
        if self.every < 1 or not (self.sites or self.final):
            raise SteerError(
                f"segments of {self.every} positions at {len(self.sites)} sites were asked for",
                "at least one position, and a site or final=True",
            )
        for name in self.sites:
            if not known_site(name).has_vectors:
                raise SteerError(f"the site {name!r} has no vector per token", "a site whose values are activations")

    def options(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self) | {"sites": list(self.sites)}

    def prepare(self, model: SteerableModel, layers: Layers) -> Prepared:
        """Return what it reads and keeps.

        Raises:
            SteerError: none of the layers has one of the sites.
        """
        where = {name: layers_with(model, name, layers) for name in self.sites}
        keeps = {
            segment_quantity(name, self.span, self.every): Kept(
                (len(where[name]), *width(model, name)), where[name], self.span, every=self.every
            )
            for name in self.sites
        }
        if self.final:
            kept = Kept((model.anatomy.hidden,), None, self.span, every=self.every)
            keeps[segment_quantity(FINAL, self.span, self.every)] = kept
        return Prepared(where, (self.span,), keeps, lambda batch: _SegmentPass(batch, self))


@dataclass(frozen=True, eq=False)
class Cut:
    """How the positions of a batch fall into segments.

    Attributes:
        counts: segments of each trace.
        rows, places: (segment, slot) the trace and the position in each slot; spare slots repeat the segment's first.
        weights: (segment, slot) whose product with the slots' values is the segment's mean; 0 in spare slots.
    """

    counts: tuple[int, ...]
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    weights: NDArray[np.float32]


def cut(positions: Sequence[Sequence[int]], every: int) -> Cut:
    """Cut the positions of every trace into segments of `every`."""
    lengths = np.array([len(places) for places in positions], dtype=np.int64)
    counts = -(-lengths // every)
    slots = max(1, min(every, int(lengths.max(initial=0))))
    rows = np.repeat(np.arange(len(lengths)), counts)
    firsts = (np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)) * every
    order = firsts[:, None] + np.arange(slots)
    inside = order < lengths[rows][:, None]
    flat = np.concatenate([np.asarray(places, dtype=np.int64) for places in positions] or [np.zeros(0, np.int64)])
    starts = (np.cumsum(lengths) - lengths)[rows]
    places = flat[starts[:, None] + np.where(inside, order, firsts[:, None])]
    weights = inside / inside.sum(1, keepdims=True)
    return Cut(tuple(counts.tolist()), np.broadcast_to(rows[:, None], places.shape), places, weights.astype(np.float32))


class _SegmentPass:
    """Segments of any sites during one forward pass."""

    def __init__(self, batch: Batch, recorder: SegmentMeans) -> None:
        self.batch, self.recorder = batch, recorder
        self.cut = cut(batch.positions[recorder.span], recorder.every)
        self.means: dict[str, list[Tensor]] = {name: [] for name in recorder.sites}
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def observe(self, site: str, layer: int, value: Tensor) -> None:
        """Reduce the tokens of one layer to one mean per segment; layers arrive in order."""
        if value.device not in self._moved:
            index = self.cut.rows * value.shape[1] + self.cut.places
            self._moved[value.device] = self._on(value.device, index)
        self.means[site].append(_averaged(value.flatten(0, 1), *self._moved[value.device]))

    def _on(self, device: torch.device, index: NDArray[Any]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(index.reshape(-1)).to(device), torch.from_numpy(self.cut.weights).to(device)

    def rows(self, final: Sequence[Float[Tensor, "_ hidden"]]) -> dict[str, Sequence[Tensor]]:
        """Return one tensor (segment, layer, ...) per trace and site, on the CPU, in float32."""
        span, every = self.recorder.span, self.recorder.every
        found: dict[str, Sequence[Tensor]] = {}
        for site, layers in self.means.items():
            stacked = torch.stack([mean.to(layers[0].device) for mean in layers], dim=1).cpu()
            found[segment_quantity(site, span, every)] = torch.split(stacked, list(self.cut.counts))
        if self.recorder.final:
            lengths = [len(trace.tokens) for trace in self.batch.traces]
            starts = np.cumsum([0, *lengths[:-1]])
            mean = _averaged(
                torch.cat(list(final)), *self._on(final[0].device, starts[self.cut.rows] + self.cut.places)
            )
            found[segment_quantity(FINAL, span, every)] = torch.split(mean.cpu(), list(self.cut.counts))
        return found


def _averaged(
    tokens: Float[Tensor, "token *width"], index: Tensor, weights: Float[Tensor, "segment slot"]
) -> Float[Tensor, "segment *width"]:
    """Return the weighted sums of the tokens in each segment's slots, in float32."""
    slots = tokens[index].float().reshape(*weights.shape, math.prod(tokens.shape[1:]))
    return torch.bmm(weights[:, None], slots).reshape(len(weights), *tokens.shape[1:])
