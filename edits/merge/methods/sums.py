"""Sums over pieces in an order that depends on sizes alone, never on threads.

numpy adds a contiguous array pairwise in one thread; the sums of pieces are added exactly (math.fsum).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from torch import Tensor

SMALL = 1e-7


def total(piece: Float[Tensor, " n"]) -> float:
    """Return the sum of a contiguous float64 piece on the CPU."""
    return float(np.add.reduce(piece.numpy()))


def inner(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Return the inner product of two contiguous float64 pieces on the CPU."""
    return total(first * second)


def magnitude(piece: Float[Tensor, " n"]) -> float:
    """Return the sum of absolute values."""
    return total(piece.abs())


def ratio(before: Iterable[float], after: Iterable[float]) -> float:
    """Return sum(before) / sum(after), or 1 where one of them is below 1e-7, as mergekit has it."""
    whole, left = math.fsum(before), math.fsum(after)
    return 1.0 if whole < SMALL or left < SMALL else whole / left
