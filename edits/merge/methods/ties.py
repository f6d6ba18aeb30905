"""TIES (arXiv 2306.01708; mergekit's `ties`): trim, elect signs, take the mean of those that agree.

Per tensor and model, the k = max(1, int(density · n)) entries of delta_i = theta_i - base with the largest |delta_i|
are kept and the others set to 0; then the rule of `consensus` and

    theta = base + lambda change

As in mergekit, entries are chosen per tensor (the paper chooses over the whole task vector), and `normalize` is true.
`rescale` multiplies the kept entries so that their sum of magnitudes is that of all (mergekit's option, off by
default). Ours: of entries with equal magnitude at the edge the first in storage order are kept, so the result does
not depend on a sort; mergekit keeps whichever its sort leaves first, and compares magnitudes in float32.

The edge is found without holding the tensor: the bits of a non-negative float64 order as an integer, so the k-th
largest magnitude follows from counts of leading bits, digit by digit, over pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edits.merge.methods.consensus import agreed_
from edits.merge.methods.sums import magnitude, ratio

DIGIT = 16
FEW = 1 << 16

Bits = np.ndarray[tuple[int], np.dtype[np.int64]]
Pieces = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Edge:
    """Which entries are kept: those above a magnitude, and the first few that have it.

    Attributes:
        magnitude: the k-th largest; infinite where nothing is kept, -1 where everything is.
        equal: how many entries of exactly this magnitude are kept, the first ones.
        among: how many there are.
        factor: what kept entries are multiplied by.
    """

    magnitude: float
    equal: int = 0
    among: int = 0
    factor: float = 1.0

    @property
    def ties(self) -> int:
        """Entries at the edge that were dropped although others of the same magnitude were kept."""
        return self.among - self.equal


ALL = Edge(-1.0)


def ties(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    scale: float = 1.0,
    rescale: bool = False,
) -> Float[Tensor, "*shape"]:
    """Merge one tensor.

    Args:
        base: what differences are taken from, float64.
        models: the tensor of each model, float64.
        weights: one per model; 0 leaves the model out.
        densities: share of entries kept per model, 0 to 1.
        normalize: divide by the weights of those that agree.
        scale: lambda.
        rescale: keep each difference's sum of magnitudes.
    """
    deltas, used = [], []
    for model, weight, density in zip(models, weights, densities, strict=True):
        if weight == 0 or density == 0 or scale == 0:
            continue
        delta = model - base
        flat = delta.reshape(-1)
        edge = find_edge(lambda flat=flat: iter([flat]), flat.numel(), density)  # type: ignore[misc]
        if rescale:
            edge = rescaled(edge, lambda flat=flat: iter([flat]))  # type: ignore[misc]
        trim_(flat, edge, 0)
        deltas.append(delta)
        used.append(weight)
    return base.clone() if not deltas else agreed_(deltas, used, normalize, scale).add_(base)


def find_edge(deltas: Pieces, count: int, density: float) -> Edge:
    """Find the k-th largest magnitude of a difference that comes in pieces.

    Args:
        deltas: begins the pieces anew at each call, float64, flat, in storage order.
        count: n, entries of all pieces together.
        density: share to keep, above 0.
    """
    if density >= 1 or count == 0:
        return ALL
    left = max(1, int(density * count))
    high, known = 0, 0  # The leading bits of the edge that are known, and how many they are.
    while True:
        histogram = np.zeros(1 << DIGIT, dtype=np.int64)
        for bits in _matching(deltas, high, known):
            digits = (bits >> (64 - known - DIGIT)) & ((1 << DIGIT) - 1)
            histogram += np.bincount(digits, minlength=1 << DIGIT)
        above = histogram[::-1].cumsum()[::-1] - histogram
        digit = int(np.flatnonzero(above < left)[0])
        left -= int(above[digit])
        high, known = high << DIGIT | digit, known + DIGIT
        if known == 64:
            return Edge(_magnitude_of(high), left, int(histogram[digit]))
        counted = _counted(_matching(deltas, high, known))
        if counted is not None:
            values, counts = counted
            below = counts[::-1].cumsum()[::-1]
            at = int(np.flatnonzero(below >= left)[-1])
            return Edge(_magnitude_of(int(values[at])), left - int(below[at] - counts[at]), int(counts[at]))


def _counted(pieces: Iterator[Bits]) -> tuple[Bits, Bits] | None:
    """Return the different values, in order, and how often each is there; None where they are more than `FEW`.

    Differences of bf16 models have few: numbers of a coarse grid repeat.
    """
    values, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for bits in pieces:
        found, often = np.unique(bits, return_counts=True)
        joined, place = np.unique(np.concatenate([values, found]), return_inverse=True)
        summed = np.zeros(joined.size, dtype=np.int64)
        summed[place[: values.size]] = counts
        summed[place[values.size :]] += often
        values, counts = joined, summed
        if values.size > FEW:
            return None
    return values, counts


def _matching(deltas: Pieces, high: int, known: int) -> Iterator[Bits]:
    """Yield the bits of the magnitudes that begin with `high`."""
    for delta in deltas():
        bits = delta.abs().numpy().view(np.int64)
        yield bits if known == 0 else bits[bits >> (64 - known) == high]


def _magnitude_of(bits: int) -> float:
    return float(np.array([bits], dtype=np.int64).view(np.float64)[0])


def rescaled(edge: Edge, deltas: Pieces) -> Edge:
    """Return the edge with the factor that gives the kept entries the sum of magnitudes of all."""
    before, after, seen = [], [], 0
    for delta in deltas():
        before.append(magnitude(delta))
        kept = delta.clone()
        seen += trim_(kept, edge, seen)
        after.append(magnitude(kept))
    return Edge(edge.magnitude, edge.equal, edge.among, ratio(before, after))


def trim_(delta: Float[Tensor, " n"], edge: Edge, seen: int) -> int:
    """Set the entries of a piece below the edge to 0; return how many of the edge's own magnitude it has.

    Once enough of those were seen, 0 is returned.

    Args:
        delta: changed in place.
        edge: of the whole difference.
        seen: entries of the edge's magnitude in the pieces before.
    """
    if edge is ALL:
        return 0
    left, at, kept = edge.equal - seen, 0, None
    if left > 0:
        found = np.flatnonzero(np.abs(delta.numpy()) == edge.magnitude)
        at, first = found.size, torch.from_numpy(found[:left])
        kept = first, delta[first]
    torch.nn.functional.hardshrink(delta, edge.magnitude, out=delta)
    if kept is not None:
        delta[kept[0]] = kept[1]
    if edge.factor != 1.0:
        delta.mul_(edge.factor)
    return at
