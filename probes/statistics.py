"""Weights over rows: differences of means, shuffled labels, halves.

A difference of means is one row of weights: +1/n on long rows, -1/n on short ones. Several strata (groups of equal
size) are joined with weights n_s n_l / (n_s + n_l), which is the least-squares estimate of the length effect with one
intercept per group: a group counts for as much as it can say. The choice is ours; the paper compares without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from probes.lengths import Choice, Stratum

Weights = np.ndarray[Any, np.dtype[np.float64]]


def contrast(strata: Sequence[Stratum], rows: int) -> Weights:
    """Return weights (row,) whose product with the rows is mean(long) - mean(short), strata joined as above."""
    weights = np.zeros(rows)
    shares = [len(stratum.short) * len(stratum.long) / (len(stratum.short) + len(stratum.long)) for stratum in strata]
    for stratum, share in zip(strata, shares, strict=True):
        part = share / sum(shares)
        weights[list(stratum.long)] += part / len(stratum.long)
        weights[list(stratum.short)] -= part / len(stratum.short)
    return weights


def mean_of(indices: Sequence[int], rows: int) -> Weights:
    """Return weights (row,) whose product with the rows is the mean of some of them."""
    weights = np.zeros(rows)
    weights[list(indices)] = 1.0 / len(indices)
    return weights


def shuffled(choice: Choice, rows: int, draws: int, seed: int) -> Weights:
    """Return contrasts (draw, row) with the labels short and long exchanged at random within every stratum.

    The numbers of short and long stay; a draw depends on the seed and its own number alone.
    """
    found = np.zeros((draws, rows))
    for draw in range(draws):
        random = np.random.default_rng([seed, draw])
        mixed = []
        for stratum in choice.strata:
            both = random.permutation(np.array([*stratum.short, *stratum.long]))
            cut = len(stratum.short)
            mixed.append(Stratum(stratum.label, tuple(sorted(both[:cut].tolist())), tuple(sorted(both[cut:].tolist()))))
        found[draw] = contrast(mixed, rows)
    return found


def halves(choice: Choice, items: Sequence[str | None], splits: int, seed: int) -> list[tuple[Choice, Choice]]:
    """Return pairs of choices that share no item, each half of the items, drawn `splits` times.

    Replies to one question go to the same half. A split that leaves one half without short or long rows is left out,
    so fewer pairs may come back.
    """
    pairs = []
    for split in range(splits):
        random = np.random.default_rng([seed, split])
        names = sorted({str(items[row]) for row in (*choice.short, *choice.long)})
        chosen = set(random.permutation(np.array(names))[: len(names) // 2].tolist())
        parts = [
            _restricted(choice, [str(item) in chosen for item in items]),
            _restricted(choice, [str(item) not in chosen for item in items]),
        ]
        if all(part.strata for part in parts):
            pairs.append((parts[0], parts[1]))
    return pairs


def _restricted(choice: Choice, inside: Sequence[bool]) -> Choice:
    strata = []
    for stratum in choice.strata:
        short = tuple(row for row in stratum.short if inside[row])
        long = tuple(row for row in stratum.long if inside[row])
        if short and long:
            strata.append(Stratum(stratum.label, short, long))
    return Choice(tuple(strata), choice.rule, choice.counts, choice.edges)


def as_tensor(weights: Weights | Sequence[Weights]) -> Float64[Tensor, "combination row"]:
    """Return weights as the matrix that `Summary.combine` takes."""
    return torch.from_numpy(np.atleast_2d(np.asarray(weights, dtype=np.float64)))


def cosines(a: Float64[Tensor, "layer *width"], b: Float64[Tensor, "layer *width"]) -> Float64[Tensor, " layer"]:
    """Return the cosine per layer in float64; 0 where a vector is zero."""
    first, second = a.flatten(1), b.flatten(1)
    scale = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    return torch.where(scale > 0, (first * second).sum(1) / scale.clamp(min=1e-300), torch.zeros_like(scale))
