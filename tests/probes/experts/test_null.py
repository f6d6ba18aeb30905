"""Chances against places that were really permuted: all of them for tiny tables, many thousands for larger ones."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from probes.experts import null as module
from probes.experts.formulas import METHODS
from probes.experts.null import PRECISION, Null, chances, hypergeometric, together_of
from steer.errors import SteerError

Trace = tuple[np.ndarray, Sequence[int]]
"""Whether each token chose the expert, and how many tokens are each marker."""


def score(
    name: str, signs: Sequence[float], ks: Sequence[int], chosen: int, marked: Sequence[int], tokens: int
) -> float:
    return sum(
        sign * float(METHODS[name](float(k), float(chosen), float(m), float(tokens)))
        for sign, k, m in zip(signs, ks, marked, strict=True)
    )


def ours(name: str, signs: Sequence[float], traces: Sequence[Trace], together: Sequence[int]) -> float:
    chosen = np.array([sum(int(row.sum()) for row, _ in traces)])
    marked = [sum(counts[place] for _, counts in traces) for place in range(len(signs))]
    nulls = []
    for place in range(len(signs)):
        made = Null(chosen, len(traces))
        for row, counts in traces:
            if counts[place]:
                made.add([(np.array([int(row.sum())]), len(row), counts[place])])
        nulls.append(made)
    tokens = sum(len(row) for row, _ in traces)
    return float(chances(nulls, METHODS[name], signs, chosen, np.array(together)[:, None], marked, tokens)[0])


def by_enumeration(name: str, signs: Sequence[float], traces: Sequence[Trace], together: Sequence[int]) -> float:
    """Put every marker at every set of places of every trace, each marker by itself."""
    chosen = sum(int(row.sum()) for row, _ in traces)
    tokens = sum(len(row) for row, _ in traces)
    marked = [sum(counts[place] for _, counts in traces) for place in range(len(signs))]
    per_marker = []
    for place in range(len(signs)):
        total = Counter({0: 1})
        for row, counts in traces:
            here = Counter(
                int(row[list(where)].sum()) for where in itertools.combinations(range(len(row)), counts[place])
            )
            total = Counter(
                {k: sum(total[k - j] * n for j, n in here.items()) for k in range(max(total) + max(here) + 1)}
            )
        per_marker.append(total)
    observed = score(name, signs, together, chosen, marked, tokens)
    large = everything = 0
    for ks in itertools.product(*per_marker):
        ways = math.prod(counts[k] for counts, k in zip(per_marker, ks, strict=True))
        everything += ways
        large += ways * (score(name, signs, ks, chosen, marked, tokens) >= observed - 1e-9)
    return large / everything


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1), (1, -1, -0.5)])
def test_chances_are_those_of_every_permutation(name: str, signs: tuple[float, ...]) -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        traces: list[Trace] = [
            (random.random(size) < 0.4, [int(random.integers(0, 3)) for _ in signs])
            for size in random.integers(3, 8, size=3).tolist()
        ]
        traces.append((np.array([True, False, True]), [1 for _ in signs]))
        together = []
        for place in range(len(signs)):
            drawn = [row[random.permutation(len(row))[: counts[place]]].sum() for row, counts in traces]
            together.append(int(sum(drawn)))
        expected = by_enumeration(name, signs, traces, together)
        assert ours(name, signs, traces, together) == pytest.approx(expected, abs=1e-12)


def test_chances_of_a_larger_table_are_those_of_many_permutations() -> None:
    random = np.random.default_rng(5)
    traces: list[Trace] = [
        (random.random(size) < 0.15, (1, int(size) // 20)) for size in random.integers(40, 200, size=25)
    ]
    signs, draws = (1, -1), 5000
    totals = []
    for place in range(2):
        drawn = np.zeros(draws, dtype=np.int64)
        for row, counts in traces:
            places = np.argsort(random.random((draws, len(row))), axis=1)[:, : counts[place]]
            drawn += row[places].sum(axis=1)
        totals.append(drawn)
    chosen, tokens = sum(int(row.sum()) for row, _ in traces), sum(len(row) for row, _ in traces)
    marked = [sum(counts[place] for _, counts in traces) for place in range(2)]
    scores = np.array([score("npmi", signs, ks, chosen, marked, tokens) for ks in zip(*totals, strict=True)])
    for together in ((6, 15), (3, 20), (9, 10)):
        share = float((scores >= score("npmi", signs, together, chosen, marked, tokens) - 1e-9).mean())
        error = math.sqrt(share * (1 - share) / draws)
        assert abs(ours("npmi", signs, traces, together) - share) < 4 * error + 1e-4


def test_one_traces_counts_are_hypergeometric() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        tokens = int(random.integers(1, 3000))
        marked = int(random.integers(1, tokens + 1))
        chosen = random.integers(0, tokens + 1, size=5)
        expected = stats.hypergeom(tokens, chosen[:, None], marked).pmf(np.arange(marked + 1))
        np.testing.assert_allclose(hypergeometric(tokens, chosen, marked), expected, rtol=1e-7, atol=1e-13)
    assert hypergeometric(10, np.array([0, 10, 5]), 1).tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def test_what_is_left_out_at_the_ends_is_told() -> None:
    """1500 traces with one marker each: a sum of coins, whose distribution numpy's longer arithmetic keeps whole."""
    traces, tokens = 1500, 200
    random = np.random.default_rng(2)
    per_trace = random.integers(0, 60, size=(traces, 3))
    per_trace[:, 2] = 30
    made = Null(per_trace.sum(axis=0), traces)
    whole = np.zeros((3, traces + 1), dtype=np.longdouble)
    whole[:, 0] = 1
    for row in per_trace:
        made.add([(row, tokens, 1)])
        share = (row / np.longdouble(tokens))[:, None]
        whole[:, 1:] = whole[:, 1:] * (1 - share) + whole[:, :-1] * share
        whole[:, 0] *= 1 - share[:, 0]
    (chunk,) = made.chunks
    assert chunk.mass.shape[1] < 500, "a window, not all of 1501 counts"
    for row, expert in enumerate(chunk.experts):
        exact = whole[expert]
        kept = exact[chunk.first : chunk.first + chunk.mass.shape[1]]
        np.testing.assert_allclose(chunk.mass[row], kept.astype(np.float64), rtol=1e-12, atol=1e-15)
        assert float(exact.sum() - kept.sum()) <= chunk.lost[row] + 1e-18
        assert chunk.lost[row] <= PRECISION
    binomial = stats.binom(traces, 0.15)
    together, chosen = np.array([[0, 0, 290]]), per_trace.sum(axis=0)
    together[0, :2] = 1
    found = chances([made], METHODS["npmi"], [1.0], chosen, together, [traces], traces * tokens)
    assert found[2] == pytest.approx(binomial.sf(289), rel=1e-9)
    assert found[0] == pytest.approx(1.0)
    together[0, 2] = 800
    assert chances([made], METHODS["npmi"], [1.0], chosen, together, [traces], traces * tokens)[2] == pytest.approx(PRECISION, rel=1)  # fmt: skip


def test_experts_in_many_chunks_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    per_trace = random.integers(0, 20, size=(6, 40))
    together = random.integers(0, 7, size=(1, 40))
    found = []
    for chunk in (1, 7, 256):
        monkeypatch.setattr(module, "CHUNK", chunk)
        made = Null(per_trace.sum(axis=0), 6)
        for row in per_trace:
            made.add([(row, 20, 2)])
        found.append(chances([made], METHODS["pmi"], [1.0], per_trace.sum(axis=0), together, [12], 120))
    np.testing.assert_allclose(found[0], found[2], atol=1e-14)
    np.testing.assert_allclose(found[1], found[2], atol=1e-14)


def test_an_expert_that_no_token_chose_has_no_chance_and_one_that_all_chose_has_one() -> None:
    made = Null(np.array([0, 30]), 3)
    for _ in range(3):
        made.add([(np.array([0, 10]), 10, 2)])
    found = chances([made], METHODS["npmi"], [1.0], np.array([0, 30]), np.array([[0, 6]]), [6], 30)
    assert math.isnan(found[0])
    assert found[1] == 1.0


def test_too_many_combinations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 20)
    rows: list[Trace] = [(np.arange(30) % 3 == 0, (6, 6, 6))]
    assert ours("npmi", (1, -1), [(rows[0][0], (6, 6))], (2, 2)) > 0
    with pytest.raises(SteerError, match=r"combinations.*--no-null"):
        ours("npmi", (1, -1, 1), rows, (2, 2, 2))


def test_replies_to_one_question_rise_and_fall_together() -> None:
    """Against quantiles of scipy's distributions at every chance at which one of them changes."""
    random = np.random.default_rng(2)
    for _ in range(30):
        laws = []
        for _ in range(int(random.integers(2, 5))):
            tokens = int(random.integers(3, 20))
            laws.append((tokens, int(random.integers(0, tokens + 1)), int(random.integers(1, 4))))
        parts = [hypergeometric(tokens, np.array([chosen]), marked) for tokens, chosen, marked in laws]
        edges = np.unique(np.concatenate([[0.0, 1.0], *(np.cumsum(part[0]) for part in parts)]).round(12))
        expected = np.zeros(sum(marked for *_, marked in laws) + 1)
        for low, high in itertools.pairwise(edges):
            expected[sum(int(stats.hypergeom(*law).ppf((low + high) / 2)) for law in laws)] += high - low
        np.testing.assert_allclose(together_of(parts)[0], expected, atol=1e-10)
