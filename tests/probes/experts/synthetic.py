"""Traces routed by no model: ids drawn at random, with an expert tied to a marker where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.collect.summary import Summary
from probes.experts import from_routed
from steer.traces import Trace
from tests import tiny
from tests.probes import made

WAIT, SO = tiny.WORDS.index("wait"), tiny.WORDS.index("so")
LAYERS = (1, 3)
TOKENIZER = tiny.tokenizer()
Ids = NDArray[np.int64]


def traces(seed: int, questions: int = 8, samples: int = 1, longest: int = 24, rate: float = 0.0) -> list[Trace]:
    """Random replies; between their marks each word is `wait` with probability `rate`."""
    random = np.random.default_rng([seed, 1])
    found = []
    for index in range(questions * samples):
        words = random.integers(made.FIRST_WORD, made.FIRST_WORD + 10, size=int(random.integers(4, longest)))
        words[random.random(len(words)) < rate] = WAIT
        tokens = (made.THINK, *words.tolist(), made.CLOSE, 30, 31, made.END)
        item, sample = f"q{index // samples:02d}", index % samples
        found.append(Trace(f"{item}/{sample}", item, sample, "x", (8, 9, 11), tokens))
    return found


def routed(
    given: Sequence[Trace],
    seed: int,
    *,
    experts: int = 16,
    chosen: int = 2,
    layers: int = 2,
    tied: Mapping[tuple[int, int], int] | None = None,
    strength: float = 1.0,
) -> list[Ids]:
    """Ids of each trace: distinct experts with uneven odds.

    `tied` maps (layer's place, expert) to a token; elsewhere such an expert is an average one.
    """
    random = np.random.default_rng([seed, 2])
    odds = random.normal(0.0, 1.0, (layers, experts))
    for place in tied or {}:
        odds[place] = 0.0
    found = []
    for trace in given:
        scores = odds + random.gumbel(size=(len(trace.tokens), layers, experts))
        for (layer, expert), token in (tied or {}).items():
            at = np.array([each == token for each in trace.tokens]) & (random.random(len(trace.tokens)) < strength)
            scores[at, layer, expert] = 1e9
        found.append(np.argsort(-scores, axis=2)[:, :, :chosen])
    return found


def summary(
    given: Sequence[Trace], ids: Sequence[Ids], markers: Mapping[str, float], experts: int = 16, **more: Any
) -> Summary:
    return from_routed(given, ids, LAYERS, experts=experts, tokenizer=TOKENIZER, model=made.identity(), markers=markers, **more)  # fmt: skip
