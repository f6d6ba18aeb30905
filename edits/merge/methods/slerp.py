"""Spherical linear interpolation of two models (mergekit's `slerp`), per tensor, over all its numbers at once.

    cos = <a, b> / (‖a‖ ‖b‖),   theta = arccos(cos)
    result = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b

on the tensors themselves, not on unit vectors: with equal norms the norm stays, else it lies near between. Where
|cos| > 0.9995 the result is (1 - t) a + t b, as in mergekit; checkpoints of one family are nearly always that close,
so slerp is then linear interpolation, and the plan's result says on how many tensors. A norm of at most 1e-8 counts
as 1. t = 0 is the base; t = 0 and t = 1 give the ends bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from edits.merge.methods.sums import inner
from steer.errors import SteerError

PARALLEL = 0.9995
SMALL = 1e-8


@dataclass(frozen=True)
class Mix:
    """How much of each tensor the result has.

    Attributes:
        first, second: factors of base and model.
        cosine: between the two.
        straight: whether this is linear interpolation, since they are nearly parallel.
    """

    first: float
    second: float
    cosine: float
    straight: bool


def slerp(base: Float[Tensor, "*shape"], model: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """Merge one tensor.

    Args:
        base: at t = 0, float64.
        model: at t = 1, float64.
        t: where between them; beyond 0 to 1 extrapolates.
    """
    if t in (0, 1):
        return (model if t else base).clone()
    first, second = base.contiguous().reshape(-1), model.contiguous().reshape(-1)
    return slerp_(first.clone(), second.clone(), mix(t, [products(first, second)])).reshape(base.shape)


def products(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> tuple[float, float, float]:
    """Return <a, a>, <a, b>, <b, b> of one piece."""
    return inner(first, first), inner(first, second), inner(second, second)


def mix(t: float, pieces: Iterable[tuple[float, float, float]]) -> Mix:
    """Return the factors for a tensor whose pieces have these products.

    Raises:
        SteerError: the tensors hold numbers that are not finite, so there is no angle between them.
    """
    columns = list(zip(*pieces, strict=True)) or [(0.0,)] * 3
    if not all(math.isfinite(value) for column in columns for value in column):
        raise SteerError("the models hold infinite numbers or NaN, so there is no angle between them", "finite weights")
    aa, ab, bb = (math.fsum(column) for column in columns)
    norms = [norm if norm > SMALL else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    cosine = min(1.0, max(-1.0, ab / norms[0] / norms[1]))
    if abs(cosine) > PARALLEL:
        return Mix(1 - t, t, cosine, True)
    theta = math.acos(cosine)
    return Mix(math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta), cosine, False)


def slerp_(first: Float[Tensor, " n"], second: Float[Tensor, " n"], mixed: Mix) -> Float[Tensor, " n"]:
    """Return the result in the first piece; the second is used up."""
    return first.mul_(mixed.first).add_(second.mul_(mixed.second))
