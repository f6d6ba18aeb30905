"""Scores from counts against their definitions, in plain floats and by scikit-learn."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from probes.experts.formulas import METHODS, method, npmi, pmi, rate_ratio, risk_difference
from steer.errors import SteerError


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Return k, K, M and T that some table of tokens has."""
    tokens = draw(st.integers(2, 400))
    marked = draw(st.integers(1, tokens - 1))
    chosen = draw(st.integers(1, tokens))
    return draw(st.integers(max(0, marked + chosen - tokens), min(marked, chosen))), chosen, marked, tokens


def score(name: str, *given: int) -> float:
    return float(METHODS[name](*map(float, given)))


@given(counts())
def test_every_method_is_what_its_definition_says(given: tuple[int, int, int, int]) -> None:
    """Probabilities from a table of tokens, one row each, by counting rows."""
    k, chosen, marked, tokens = given
    table = [(True, True)] * k + [(True, False)] * (marked - k) + [(False, True)] * (chosen - k)
    table += [(False, False)] * (tokens - len(table))
    assert len(table) == tokens
    p_marker = sum(marker for marker, _ in table) / tokens
    p_expert = sum(expert for _, expert in table) / tokens
    p_both = sum(marker and expert for marker, expert in table) / tokens
    if p_both:
        information = math.log2(p_both / (p_marker * p_expert))
        assert score("pmi", *given) == pytest.approx(information, abs=1e-12)
        expected = 0.0 if p_both == 1 else information / -math.log2(p_both)
        assert score("npmi", *given) == pytest.approx(expected, abs=1e-11)
    else:
        assert (score("npmi", *given), score("pmi", *given)) == (-1.0, -math.log2(tokens))
    with_marker = [expert for marker, expert in table if marker]
    without = [expert for marker, expert in table if not marker]
    assert score("risk_difference", *given) == pytest.approx(np.mean(with_marker) - np.mean(without), abs=1e-12)
    assert score("rate_ratio", *given) == pytest.approx(np.mean(with_marker) / p_expert, abs=1e-12)


@given(counts())
def test_information_of_all_four_cells_adds_up_to_scikit_learns(given: tuple[int, int, int, int]) -> None:
    k, chosen, marked, tokens = given
    cells = [
        (k, chosen, marked, tokens),
        (marked - k, tokens - chosen, marked, tokens),
        (chosen - k, chosen, tokens - marked, tokens),
        (tokens - chosen - marked + k, tokens - chosen, tokens - marked, tokens),
    ]
    total = sum(cell[0] / tokens * score("pmi", *cell) for cell in cells if cell[0])
    table = np.array([[cells[0][0], cells[1][0]], [cells[2][0], cells[3][0]]])
    expected = mutual_info_score(None, None, contingency=table)
    assert total * math.log(2) == pytest.approx(expected, abs=1e-12)


@given(counts())
def test_every_method_grows_with_k(given: tuple[int, int, int, int]) -> None:
    _, chosen, marked, tokens = given
    possible = range(max(0, marked + chosen - tokens), min(marked, chosen) + 1)
    for name in METHODS:
        scores = [score(name, k, chosen, marked, tokens) for k in possible]
        assert all(a < b for a, b in pairwise(scores)), name


def test_the_corners_are_exact() -> None:
    assert npmi(*map(float, (30, 30, 30, 5000))) == 1, "perfect"
    assert npmi(*map(float, (6, 60, 30, 300))) == 0, "independent"
    assert npmi(*map(float, (0, 60, 30, 300))) == -1, "never together"
    assert npmi(*map(float, (30, 300, 30, 300))) == 0, "chosen by every token"
    assert npmi(*map(float, (300, 300, 300, 300))) == 0, "every token is both"
    assert pmi(*map(float, (6, 60, 30, 300))) == 0
    assert pmi(*map(float, (0, 60, 30, 300))) <= pmi(*map(float, (1, 299, 299, 300)))
    assert rate_ratio(*map(float, (6, 60, 30, 300))) == 1
    assert risk_difference(*map(float, (30, 30, 30, 300))) == 1
    for formula in METHODS.values():
        assert math.isnan(formula(*map(float, (0, 0, 30, 300)))), "an expert that no token chose"
        assert math.isnan(formula(*map(float, (0, 30, 0, 300)))), "a marker that stands nowhere"


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(SteerError, match=r"'lift'.*npmi, pmi, risk_difference, rate_ratio"):
        method("lift")
