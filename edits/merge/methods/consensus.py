"""Electing a sign per entry, and the mean of those that agree (TIES, arXiv 2306.01708, §3; mergekit's `sum` consensus).

    gamma = sign(sum_i w_i delta_i), where 0 counts as +
    change = sum_i [sign(w_i delta_i) = gamma] w_i delta_i / sum_i [sign(w_i delta_i) = gamma] w_i

entry by entry; a divisor of 0 counts as 1, and a difference of 0 agrees with neither sign. Without `normalize` the sum
is not divided. (A sum of -0 has no entry that agrees, so the sign of a zero does not matter.) The paper averages with equal weights, which is the same where all w_i are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_ONE = torch.ones((), dtype=torch.float64)


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
    sign = deltas[0].clone()
    for delta in deltas[1:]:
        sign.add_(delta)
    torch.copysign(_ONE, sign, out=sign)
    change, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        change.add_(delta.mul_(sign).clamp_(min=0.0))  # Its magnitude where it agrees, else 0.
        if normalize:
            share.add_(delta.sign_().mul_(weight))
    if normalize:
        change.div_(share.add_(torch.eq(share, 0.0, out=deltas[0])))
    change.mul_(sign)
    return change.mul_(scale) if scale != 1.0 else change
