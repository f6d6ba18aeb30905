"""Rates of two sets of tokens, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probes
from probes.collect.routing import RouterCounts
from probes.experts import expert_differences
from steer.errors import SteerError
from tests.probes import made
from tests.probes.experts.synthetic import Ids, routed, summary, traces


def rates(ids: list[Ids]) -> np.ndarray:
    rows = np.concatenate(ids)
    return np.stack([(rows == expert).any(2).mean(0) for expert in range(16)], -1)


@pytest.mark.parametrize("paired", [True, False])
def test_differences_and_their_interval_are_those_of_counting_by_hand(paired: bool) -> None:
    one, other = traces(1, questions=6), traces(2, questions=6 if paired else 5, samples=2)
    ids = routed(one, 1), routed(other, 2)
    found = expert_differences(*(summary(each, those, {"so": 1.0}) for each, those in zip((one, other), ids, strict=True)), resamples=30, seed=3)  # fmt: skip
    np.testing.assert_allclose(found.values.numpy(), rates(ids[0]) - rates(ids[1]), atol=1e-6)
    assert found.tokens == sum(len(trace.tokens) for trace in (*one, *other))
    draws = []
    for draw in range(30):
        parts = []
        for place, (each, those) in enumerate(zip((one, other), ids, strict=True)):
            names = sorted({trace.item for trace in each})
            lot = np.random.default_rng(3 if paired else 6 + place)
            times = lot.multinomial(len(names), np.full(len(names), 1 / len(names)), size=30)[draw]
            parts.append(rates([those[at] for at, trace in enumerate(each) for _ in range(times[names.index(trace.item)])]))  # fmt: skip
        draws.append(parts[0] - parts[1])
    lower, upper = np.percentile(np.stack(draws), [2.5, 97.5], axis=0)
    assert found.lower is not None
    assert found.upper is not None
    np.testing.assert_allclose(found.lower.numpy(), lower, atol=1e-6)
    np.testing.assert_allclose(found.upper.numpy(), upper, atol=1e-6)
    assert found.formula == "one"
    assert found.p_value is None


def test_a_set_has_no_difference_from_itself_and_spans_of_one_run_have() -> None:
    model, run = made.model("qwen3_moe"), made.traces(6)
    found = probes.collect(model, run, recorders=[RouterCounts(("all", "thinking", "answer"))])
    same = expert_differences(found, found, resamples=5)
    assert not same.values.any()
    assert same.lower is not None
    assert not same.lower.any()
    thinking = expert_differences(found, found, span="thinking", resamples=0)
    marked = sum(row.positions["thinking"] for row in found.rows)
    assert thinking.markers[0].marked == marked
    assert thinking.tokens == 2 * marked


def test_what_cannot_be_compared_is_refused() -> None:
    model, run = made.model("qwen3_moe"), made.traces(4)
    whole = probes.collect(model, run, recorders=[RouterCounts(("all", "marker:user"))])
    grouped = probes.collect(model, run, recorders=[RouterCounts()], keep="group")
    other = probes.collect(made.model("olmoe"), run, recorders=[RouterCounts()])
    part = probes.collect(model, run, recorders=[RouterCounts()], layers=[3])
    for two, words, span in (
        ((whole, grouped), "groups", "all"),
        ((whole, other), "shape", "all"),
        ((whole, whole), "no router.count/answer", "answer"),
        ((whole, part), "other layers", "all"),
        ((whole, whole), "has the span 'marker:user'", "marker:user"),
    ):
        with pytest.raises(SteerError, match=words):
            expert_differences(*two, span=span, resamples=2)
    assert torch.isfinite(expert_differences(whole, whole, resamples=0).values).any()
