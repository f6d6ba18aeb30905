"""Task arithmetic (arXiv 2212.04089; mergekit's `task_arithmetic`).

    theta = base + lambda sum_i w_i (theta_i - base)

summed in the order of the models; with `normalize` the sum is divided by sum_i w_i (where that is below 1e-8, by 1).
A weight of 0 leaves its model out. With one model and lambda 1 this is the formula of a patch that adds
w (theta_1 - base), in the same order, so both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

SMALL = 1e-8


def task_arithmetic(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Merge one tensor.

    Args:
        base: what differences are taken from, float64.
        models: the tensor of each model, float64.
        weights: one per model.
        normalize: divide by the sum of the weights.
        scale: lambda.
    """
    kept = [(model.clone(), weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    if not kept or scale == 0:
        return base.clone()
    deltas = [model.sub_(base) for model, _ in kept]
    change = change_(deltas, [weight for _, weight in kept], divisor(weights, normalize), scale)
    return change.add_(base)


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Return what the sum of differences is divided by."""
    total = float(sum(weights))
    return total if normalize and abs(total) >= SMALL else 1.0


def change_(
    deltas: Sequence[Float[Tensor, "*n"]], weights: Sequence[float], total: float, scale: float
) -> Float[Tensor, "*n"]:
    """Return lambda sum_i w_i delta_i / total in the first of the pieces; the others are used up."""
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1.0:
            delta.mul_(weight)
    change = deltas[0]
    for delta in deltas[1:]:
        change.add_(delta)
    if total != 1.0:
        change.div_(total)
    return change.mul_(scale) if scale != 1.0 else change
