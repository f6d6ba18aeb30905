"""Linear merging, also known as a model soup (arXiv 2203.05482; mergekit's `linear`).

    theta = sum_i w_i theta_i            (normalize false)
    theta = sum_i w_i theta_i / sum_i w_i  (normalize true, mergekit's default)

summed in the order of the models. A weight of exactly 0 leaves its model out, so that weights (1, 0) give the first
model bit for bit, whatever stands in the second.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError

SMALL = 1e-8


def linear(
    models: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, normalize: bool = True
) -> Float[Tensor, "*shape"]:
    """Merge one tensor.

    Args:
        models: the tensor of each model, float64.
        weights: one per model.
        normalize: divide by the sum of the weights.

    Raises:
        SteerError: no weight differs from 0; the weights sum to 0 and are to be divided by it.
    """
    kept = [(model.clone(), weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    return linear_([model for model, _ in kept], [weight for _, weight in kept], divisor(weights, normalize))


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Return what the weighted sum is divided by.

    Raises:
        SteerError: every weight is 0, or they sum to 0 and are to be divided by it.
    """
    if not any(weights):
        raise SteerError("every model has weight 0", "one at least that counts")
    total = float(sum(weights))
    if normalize and abs(total) < SMALL:
        raise SteerError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} sum to {total:g} and are to be divided by it",
            "weights with another sum, or plain sums",
            "Say `normalize: false`",
        )
    return total if normalize else 1.0


def linear_(pieces: Sequence[Float[Tensor, "*n"]], weights: Sequence[float], total: float) -> Float[Tensor, "*n"]:
    """Merge pieces of models whose weights differ from 0; the result is in the first, the others are used up."""
    for piece, weight in zip(pieces, weights, strict=True):
        if weight != 1.0:
            piece.mul_(weight)
    merged = pieces[0]
    for piece in pieces[1:]:
        merged.add_(piece)
    return merged.div_(total) if total != 1.0 else merged
