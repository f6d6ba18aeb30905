"""MXFP4, in which 32 numbers of 4 bits share a power of two: scaling a matrix there is shifting its block exponents.

A block of numbers is 2^(e - 127) times its small ones, e a byte from 0 to 254 (E8M0 of the OCP Microscaling formats,
version 1.0, section 5.4.1; torch calls the dtype `float8_e8m0fnu`). So a matrix times 2^n is the same small numbers with
e + n: exact, or refused where that leaves the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

DTYPE = torch.float8_e8m0fnu
LARGEST = 254


def is_power_of_two(factor: float) -> bool:
    """Whether a number is 2^n with a whole n."""
    return factor > 0 and math.isfinite(factor) and math.frexp(factor)[0] == 0.5


def refusal(factors: Sequence[float]) -> tuple[str, str] | None:
    """Say why MXFP4 cannot hold a matrix times these factors, and what to do instead; None where it can."""
    odd = [factor for factor in factors if not is_power_of_two(factor)]
    if not odd:
        return None
    return (
        f"MXFP4 stores a power of two for 32 numbers each, and the factor {odd[0]:g} is none",
        "Take a power of two such as 2, 64 or 0.5, dequantise the model first, or use the hook form",
    )
