"""The methods once more, written from the papers and mergekit's rules in plain numpy on whole float64 arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(models: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    stacked = np.stack(models)
    column = np.array(weights).reshape(-1, *[1] * models[0].ndim)
    merged: Array = (stacked * column).sum(axis=0)
    return merged / sum(weights) if normalize else merged


def arithmetic(
    base: Array, models: Sequence[Array], weights: Sequence[float], normalize: bool = False, scale: float = 1
) -> Array:
    change = linear([model - base for model in models], weights, normalize and abs(sum(weights)) >= 1e-8)
    return base + scale * change


def largest(delta: Array, density: float) -> Array:
    """Keep the k largest magnitudes; of equal ones the first."""
    if density >= 1:
        return delta
    flat, kept = delta.ravel(), np.zeros(delta.size)
    order = sorted(range(flat.size), key=lambda at: (-abs(flat[at]), at))[: max(1, int(density * flat.size))]
    kept[order] = flat[order]
    return kept.reshape(delta.shape)


def agreed(base: Array, deltas: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float = 1) -> Array:
    """Sign election with loops over entries."""
    result = np.empty(base.size)
    for at in range(base.size):
        parts = [weight * delta.flat[at] for weight, delta in zip(weights, deltas, strict=True)]
        gamma = 1 if sum(parts) >= 0 else -1
        chosen = [(part, weight) for part, weight in zip(parts, weights, strict=True) if np.sign(part) == gamma]
        total, share = sum(part for part, _ in chosen), sum(weight for _, weight in chosen)
        result[at] = base.flat[at] + scale * (total / (share or 1) if normalize else total)
    return result.reshape(base.shape)


def slerp(first: Array, second: Array, t: float) -> Array:
    cosine = np.vdot(first, second) / np.linalg.norm(first) / np.linalg.norm(second)
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return np.sin((1 - t) * angle) / np.sin(angle) * first + np.sin(t * angle) / np.sin(angle) * second
