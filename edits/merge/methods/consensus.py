"""Electing a sign per entry, and the mean of those that agree (TIES, arXiv 2306.01708, §3; mergekit's `sum` consensus).

    gamma = sign(sum_i w_i delta_i), where 0 counts as +
    change = sum_i [sign(w_i delta_i) = gamma] w_i delta_i / sum_i [sign(w_i delta_i) = gamma] w_i

entry by entry; a divisor of 0 counts as 1, and a difference of 0 agrees with neither sign. Without `normalize` the sum
is not divided. The paper averages with equal weights, which is the same where all w_i are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def agreed_(
    deltas: Sequence[Float[Tensor, "*n"]], weights: Sequence[float], normalize: bool, scale: float = 1.0
) -> Float[Tensor, "*n"]:
    """Return the change that the models agree on; the pieces are used up.

    Args:
        deltas: trimmed differences, float64, one per model.
        weights: one per model.
        normalize: divide by the weights of those that agree.
        scale: lambda, multiplied on at the end.
    """
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1.0:
            delta.mul_(weight)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    positive = total >= 0
    change = total.zero_()
    share = torch.zeros_like(change) if normalize else None
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        change.add_(delta.mul_(agrees))
        if share is not None:
            share.add_(agrees, alpha=weight)
    if share is not None:
        change.div_(share.masked_fill_(share == 0, 1.0))
    return change.mul_(scale) if scale != 1.0 else change
