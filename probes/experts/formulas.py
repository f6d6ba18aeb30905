"""How closely an expert goes with a marker, from four counts (RICE, arXiv 2505.14681; SteerMoE, arXiv 2509.09660).

Of T tokens M are the marker, K choose the expert, and k are both.

| method | formula | goes from |
|---|---|---|
| `npmi` | PMI / -log2(k/T) | -1 (k = 0) over 0 (independent) to 1 (K = k = M) |
| `pmi` | log2( kT / (KM) ), bits | -log2 T (k = 0, the least that any counts give) to log2 T |
| `risk_difference` | k/M - (K-k)/(T-M) | -1 to 1 |
| `rate_ratio` | (k/M) / (K/T) | 0 over 1 (independent) to T/M |

All are float64 and increase with k where K, M and T stay. An expert that every token chooses (K = T) has nPMI 0. Where an
expert is never chosen, or no token is the marker, there is no score: NaN. RICE leaves PMI at k = 0 at minus infinity, with
which no sum over markers can be ranked; the bound in its place is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steer.errors import SteerError

Numbers = NDArray[np.float64]
Given = Numbers | float
Formula = Callable[[Given, Given, Given, Given], Numbers]
"""From k, K, M and T, which broadcast, to scores."""


def pmi(k: Given, chosen: Given, marked: Given, tokens: Given) -> Numbers:
    """Return the pointwise mutual information of expert and marker, in bits."""
    return _known(np.log2(_lift(k, chosen, marked, tokens)), -np.log2(tokens), k, chosen, marked)


def npmi(k: Given, chosen: Given, marked: Given, tokens: Given) -> Numbers:
    """Return the normalised pointwise mutual information, -1 to 1; 0 where every token is the marker and chooses the expert."""
    surprise = np.log2(tokens / np.maximum(k, 1.0))
    found = np.log2(_lift(k, chosen, marked, tokens)) / np.where(surprise > 0, surprise, 1.0)
    return _known(found, -1.0, k, chosen, marked)


def risk_difference(k: Given, chosen: Given, marked: Given, tokens: Given) -> Numbers:
    """Return how much more often the marker's tokens choose the expert than other tokens do (SteerMoE's detection)."""
    found = k / np.maximum(marked, 1.0) - (chosen - k) / np.maximum(tokens - marked, 1.0)
    return _known(found, found, k, chosen, marked)


def rate_ratio(k: Given, chosen: Given, marked: Given, tokens: Given) -> Numbers:
    """Return how many times as often the marker's tokens choose the expert as all tokens do."""
    found = (k * tokens) / np.maximum(chosen * marked, 1.0)
    return _known(found, found, k, chosen, marked)


METHODS: Mapping[str, Formula] = {
    "npmi": npmi, "pmi": pmi, "risk_difference": risk_difference, "rate_ratio": rate_ratio
}  # fmt: skip


def method(name: str) -> Formula:
    """Return the formula of a method.

    Raises:
        SteerError: there is none of that name.
    """
    if name not in METHODS:
        raise SteerError(f"there is no method {name!r}", f"one of {', '.join(METHODS)}", "RICE's own is npmi")
    return METHODS[name]


def _lift(k: Given, chosen: Given, marked: Given, tokens: Given) -> Given:
    """Return kT / (KM), exact where it is 1: both products are whole numbers. k = 0 is left to the caller."""
    return (np.maximum(k, 1.0) * tokens) / np.maximum(chosen * marked, 1.0)


def _known(found: Any, never: Any, k: Given, chosen: Given, marked: Given) -> Numbers:
    answer: Numbers = np.where((chosen > 0) & (marked > 0), np.where(k > 0, found, never), np.nan)
    return answer
