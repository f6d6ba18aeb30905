"""The chance of a score if a marker's places in its trace meant nothing: known exactly, nothing is drawn.

Null: within each trace, the tokens that are the marker stand anywhere among its T_i tokens, every choice of places as
likely as any other; each marker by itself. Then of m_i marker tokens k_i choose an expert that K_i of the trace's tokens
choose, with k_i hypergeometric (T_i, K_i, m_i). Replies to one question share a prompt, and often the very tokens at which an
opening mark stands, so they are no separate evidence: their k_i are taken to rise and fall together, each a quantile at
the same chance; no dependence has a larger variance. Questions are independent: k = sum k_i by convolution. K, T and M stay,
so a score is a function of the k of each marker, and its chance P(score as large or larger) is a sum over them: a tail for
one marker, over all combinations for several.

Sums run over positive numbers only. What is left out of a distribution, at its ends, weighs less than `PRECISION` in all
and is added to the chance; no chance is told below `PRECISION`. So but for rounding (some 1e-13 of itself) a chance is never too
small, and too large by less than 2e-15 for each marker, and 1e-15 for each question with several replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probes.experts.formulas import Formula, Numbers
from steer.errors import SteerError

PRECISION = 1e-15
CHUNK = 256  # Experts that are convolved together; they are sorted by how often they are chosen.
MOST = 2**22
TIE = 1e-9  # Scores this close count as equal: they are the same number, added up in another order.
Integers = NDArray[np.int64]
Reply = tuple[Integers, int, int]
"""Of a trace: K_i of every expert, T_i and m_i."""


@dataclass(eq=False)
class _Chunk:
    """The distribution of k of some experts after the questions so far: `mass` (expert, k - first), and what was left out."""

    experts: Integers
    mass: Numbers
    lost: Numbers
    first: int = 0

    def convolve(self, part: Numbers, first: int) -> None:
        """Add one question, whose k_i has the masses `part` (expert, k_i - first)."""
        width = self.mass.shape[1]
        total = np.zeros((len(self.mass), width + part.shape[1] - 1))
        for k in range(part.shape[1]):
            total[:, k : k + width] += self.mass * part[:, k : k + 1]
        self.mass, self.first = total, self.first + first

    def trim(self, budget: float) -> None:
        """Leave out, at each end, what weighs less than `budget` for every expert of the chunk."""
        kept, first, lost = _trimmed(self.mass, budget)
        self.mass, self.first, self.lost = kept, self.first + first, self.lost + lost


class Null:
    """The distribution of k of one marker for every expert, built question by question.

    Args:
        chosen: K of every expert, which sorts them.
        questions: how many with the marker will be added.
    """

    def __init__(self, chosen: Integers, questions: int) -> None:
        order = np.argsort(chosen, kind="stable")
        parts = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        self.chunks = [_Chunk(part, np.ones((len(part), 1)), np.zeros(len(part))) for part in parts]
        self._budget = PRECISION / (4 * max(questions, 1))  # For each end of each question and of the sum so far.

    def add(self, replies: Sequence[Reply]) -> None:
        """Add a question.

        Args:
            replies: of each trace with the marker K_i of every expert, T_i and m_i, which is at least 1.
        """
        for chunk in self.chunks:
            parts = [hypergeometric(tokens, chosen[chunk.experts], marked) for chosen, tokens, marked in replies]
            part, first, lost = _trimmed(parts[0] if len(parts) == 1 else together_of(parts), self._budget)
            chunk.convolve(part, first)
            chunk.lost += lost + (0.0 if len(parts) == 1 else PRECISION)
            chunk.trim(self._budget)


def together_of(parts: Sequence[Numbers]) -> Numbers:
    """Return P(sum of k_i = 0 … sum of m_i) where all k_i are quantiles at the same chance, from P(k_i = 0 … m_i) of each.

    The sum is at least j with the j-th largest of all chances P(k_i >= 1), P(k_i >= 2), … of all traces.
    """
    above = np.concatenate([np.cumsum(part[:, ::-1], axis=1)[:, -2::-1] for part in parts], axis=1)
    steps = np.sort(np.minimum(above, 1.0), axis=1)[:, ::-1]
    edge = np.ones((len(steps), 1))
    found: Numbers = np.concatenate([edge, steps], axis=1) - np.concatenate([steps, 0.0 * edge], axis=1)
    return found


def hypergeometric(tokens: int, chosen: Integers, marked: int) -> Numbers:
    """Return P(k_i = 0 … m_i) for every expert, shape (expert, m_i + 1).

    Args:
        tokens: T_i.
        chosen: K_i of every expert.
        marked: m_i.
    """
    k = np.arange(marked + 1)
    inside = (k >= marked + chosen[:, None] - tokens) & (k <= chosen[:, None])
    left, before = chosen[:, None] - k[:-1], tokens - chosen[:, None] - marked + k[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((left * (marked - k[:-1])) / ((k[:-1] + 1) * (before + 1)))
    steps = np.where(inside[:, 1:] & inside[:, :-1], ratio, 0.0)
    height = np.concatenate([np.zeros((len(chosen), 1)), np.cumsum(steps, axis=1)], axis=1)
    mass = np.where(inside, np.exp(height - height.max(axis=1, keepdims=True)), 0.0)
    found: Numbers = mass / mass.sum(axis=1, keepdims=True)
    return found


def chances(
    nulls: Sequence[Null],
    formula: Formula,
    signs: Sequence[float],
    chosen: Integers,
    together: Integers,
    marked: Sequence[int],
    tokens: int,
) -> Numbers:
    """Return P(score as large or larger than the one observed) under the null for every expert; NaN without a score.

    Args:
        nulls: one per marker.
        formula: of one marker's score.
        signs: of the markers in the sum.
        chosen: K, (expert,).
        together: k, (marker, expert).
        marked: M of each marker.
        tokens: T.

    Raises:
        SteerError: several markers so frequent that their combinations are too many.
    """
    found = np.full(len(chosen), np.nan)
    chunks = [{int(expert): (chunk, row) for chunk in null.chunks for row, expert in enumerate(chunk.experts)} for null in nulls]  # fmt: skip
    for expert in range(len(chosen)):
        if not chosen[expert]:
            continue
        parts, observed, lost = [], 0.0, 0.0
        for place, (sign, total) in enumerate(zip(signs, marked, strict=True)):
            chunk, row = chunks[place][expert]
            k = np.append(chunk.first + np.arange(chunk.mass.shape[1]), together[place, expert]).astype(np.float64)
            scores = sign * formula(k, float(chosen[expert]), float(total), float(tokens))
            parts.append((scores[:-1], chunk.mass[row]))
            observed, lost = observed + float(scores[-1]), lost + float(chunk.lost[row])
        found[expert] = min(1.0, max(PRECISION, _tail(parts, observed) + lost))
    return found


def _tail(parts: list[tuple[Numbers, Numbers]], observed: float) -> float:
    """P(sum of independent scores >= observed); `parts` holds the values and the masses of each."""
    parts = sorted((_possible(*part) for part in parts), key=lambda part: len(part[0]))
    points, mass = np.zeros(1), np.ones(1)
    for scores, weights in parts[:-1]:
        if len(points) * len(scores) > MOST:
            raise SteerError(
                f"the markers have {len(points) * len(scores)} combinations of counts for one expert",
                f"at most {MOST}",
                "Name fewer markers, or leave the chances out (--no-null, null=False)",
            )
        points, mass = (points[:, None] + scores).ravel(), (mass[:, None] * weights).ravel()
    scores, weights = parts[-1]
    order = np.argsort(scores)
    above = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    least = observed - points
    first = np.searchsorted(scores[order], least - TIE * (1.0 + np.abs(least) + np.abs(points)))
    return float((mass * above[first]).sum())


def _possible(scores: Numbers, mass: Numbers) -> tuple[Numbers, Numbers]:
    return scores[mass > 0], mass[mass > 0]


def _trimmed(mass: Numbers, budget: float) -> tuple[Numbers, int, Numbers]:
    """Leave out columns at both ends that add up to at most `budget` in every row: (mass, first column, left out)."""
    low = int((np.cumsum(mass, axis=1).max(axis=0) <= budget).sum())
    high = mass.shape[1] - int((np.cumsum(mass[:, ::-1], axis=1).max(axis=0) <= budget).sum())
    return mass[:, low:high], low, mass[:, :low].sum(axis=1) + mass[:, high:].sum(axis=1)
