"""Expert scores from summaries: against counting by hand, against planted experts, and under the null."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import probes
from probes.experts import METHODS, expert_scores, recorder_for
from probes.experts.counts import marks_as_markers, occurrences, resolved
from probes.experts.score import percentiles
from steer.errors import SteerError
from steer.marks import Marks
from tests import tiny
from tests.probes import made
from tests.probes.experts.synthetic import LAYERS, SO, WAIT, Ids, routed, summary, traces

MARKERS = {"<think>": 1.0, "</think>": -1.0, "wait": -0.5}


def by_hand(given: list, ids: list[Ids], experts: int, markers: dict[str, float]) -> np.ndarray:  # type: ignore[type-arg]
    """The signed sum of nPMI from lists of tokens, expert by expert."""
    words = [tiny.WORDS[token] for trace in given for token in trace.tokens]
    rows = [row for each in ids for row in each]
    found = np.zeros((len(LAYERS), experts))
    for layer in range(len(LAYERS)):
        for expert in range(experts):
            chose = [expert in row[layer] for row in rows]
            for text, sign in markers.items():
                is_marker = [word == text for word in words]
                both = sum(a and b for a, b in zip(chose, is_marker, strict=True)) / len(words)
                p_expert, p_marker = sum(chose) / len(words), sum(is_marker) / len(words)
                if not p_expert:
                    found[layer, expert] = math.nan
                elif not both:
                    found[layer, expert] -= sign
                else:
                    found[layer, expert] += sign * math.log(both / p_expert / p_marker) / -math.log(both)
    return found


def test_scores_are_those_of_counting_by_hand() -> None:
    for seed in range(3):
        given = traces(seed, rate=0.2)
        ids = routed(given, seed, experts=24)
        scores = expert_scores(summary(given, ids, MARKERS, experts=24), MARKERS, resamples=0, null=False)
        expected = by_hand(given, ids, 24, MARKERS)
        np.testing.assert_allclose(scores.values.numpy(), expected, atol=1e-6)
        assert np.isnan(expected).any(), "an expert that no token chose is among them"
        assert scores.tokens == sum(len(trace.tokens) for trace in given)
        assert [marker.marked for marker in scores.markers] == [
            len(given), len(given), sum(trace.tokens.count(WAIT) for trace in given)
        ]  # fmt: skip
        assert scores.layers == LAYERS


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_scores_of_a_model_tell_how_its_markers_are_written(family: str) -> None:
    model, run = made.model(family), made.traces(8)
    markers = {"<think>": 1, "</think>": -1, "wait,so": -1}
    found = probes.collect(model, run, recorders=[recorder_for(markers)])
    scores = expert_scores(found, markers, resamples=50, model=model)
    assert scores.layers == model.anatomy.expert_layers
    assert scores.model == model.identity
    assert [marker.variants for marker in scores.markers] == [((made.THINK,),), ((made.CLOSE,),), ((WAIT,), (SO,))]
    assert scores.markers[2].written == ("wait", "so")
    assert scores.markers[2].marked == sum(trace.tokens.count(WAIT) + trace.tokens.count(SO) for trace in run)
    assert occurrences(found, "wait,so") == scores.markers[2].marked
    chosen = model.anatomy.chosen if hasattr(model.anatomy, "chosen") else 2
    assert scores.together.sum(2).tolist() == [
        [marker.marked * chosen] * len(scores.layers) for marker in scores.markers
    ]


def test_a_summary_on_disk_gives_the_same_scores(tmp_path: Path) -> None:
    model, run = made.model("olmoe"), made.traces(40)
    markers = {"<think>": 1, "</think>": -1}
    held = probes.collect(model, run, recorders=[recorder_for(markers)])
    probes.collect(model, run, tmp_path / "s", recorders=[recorder_for(markers)])
    stored = probes.Summary.load(tmp_path / "s")
    assert len(stored.shards) > 1
    assert expert_scores(stored, markers, resamples=20) == expert_scores(held, markers, resamples=20)


# The interval.


def test_the_interval_is_that_of_resampled_questions() -> None:
    """Questions drawn as counted tables, joined and scored by hand, with all their replies."""
    given = traces(4, questions=6, samples=2, rate=0.2)
    ids = routed(given, 4, experts=8)
    markers = {"<think>": 1.0, "wait": -1.0}
    scores = expert_scores(summary(given, ids, markers, experts=8), markers, resamples=40, null=False, seed=9)
    names = sorted({trace.item for trace in given})
    times = np.random.default_rng(9).multinomial(len(names), np.full(len(names), 1 / len(names)), size=40)
    draws = []
    for drawn in times:
        places = [at for at, trace in enumerate(given) for _ in range(drawn[names.index(trace.item)])]
        draws.append(by_hand([given[at] for at in places], [ids[at] for at in places], 8, markers))
    lower, upper = np.nanpercentile(np.stack(draws), [2.5, 97.5], axis=0)
    assert scores.lower is not None
    assert scores.upper is not None
    np.testing.assert_allclose(scores.lower.numpy(), lower, atol=1e-6)
    np.testing.assert_allclose(scores.upper.numpy(), upper, atol=1e-6)


def test_layers_read_a_few_at_a_time_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    given = traces(1)
    found = summary(given, routed(given, 1), MARKERS | {"so": 1.0})
    whole = expert_scores(found, {"<think>": 1}, resamples=30, null=False)
    monkeypatch.setattr("probes.experts.score._BLOCK", 1)
    assert expert_scores(found, {"<think>": 1}, resamples=30, null=False) == whole


def test_percentiles_are_numpys() -> None:
    draws = np.random.default_rng(0).standard_normal((37, 4, 5))
    draws[np.random.default_rng(1).random(draws.shape) < 0.3] = np.nan
    draws[1:, 0, 0] = np.nan
    np.testing.assert_allclose(percentiles(draws), np.nanpercentile(draws, [2.5, 97.5], axis=0), atol=1e-12)
    draws[:, 2, 2] = np.nan
    assert np.isnan(percentiles(draws)[:, 2, 2]).all()


# The chances.


def test_chances_are_those_of_permuted_traces() -> None:
    """Marker places really permuted within each trace, a thousand times, and everything counted again."""
    given = traces(3, questions=6, rate=0.25)
    ids = routed(given, 3, experts=6)
    markers = {"wait": 1.0, "</think>": -1.0}
    scores = expert_scores(summary(given, ids, markers, experts=6), markers, resamples=0)
    chose = [np.stack([(each == expert).any(2) for expert in range(6)], -1) for each in ids]
    observed, draws = scores.values.double().numpy(), 2000
    random, large = np.random.default_rng(0), np.zeros((2, 6))
    chosen = sum(each.sum(0) for each in chose).astype(float)
    for _ in range(draws):
        total = np.zeros((2, 6))
        for token, sign in ((WAIT, 1.0), (made.CLOSE, -1.0)):
            k = np.zeros((2, 6))
            for trace, each in zip(given, chose, strict=True):
                places = random.permutation(len(trace.tokens))[: trace.tokens.count(token)]
                k += each[places].sum(0)
            marked = float(sum(trace.tokens.count(token) for trace in given))
            total += sign * METHODS["npmi"](k, chosen, marked, float(scores.tokens))
        large += total >= observed - 1e-6
    share = large / draws
    assert scores.p_value is not None
    assert (np.abs(scores.p_value.numpy() - share) < 4 * np.sqrt(share * (1 - share) / draws) + 2e-3).all()


def test_false_discoveries_are_corrected_over_all_layers() -> None:
    given = traces(2)
    found = summary(given, routed(given, 2), {"<think>": 1.0})
    scores, cautious = (expert_scores(found, {"<think>": 1}, resamples=0, correction=name) for name in ("bh", "by"))
    assert scores.p_value is not None
    assert scores.q_value is not None
    assert cautious.q_value is not None
    p = scores.p_value[torch.isfinite(scores.p_value)].numpy()
    order = np.argsort(p)
    expected = np.empty(len(p))
    least = 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        expected[order[rank - 1]] = least
    np.testing.assert_allclose(scores.q_value[torch.isfinite(scores.p_value)].numpy(), expected, rtol=1e-12)
    assert (cautious.q_value >= scores.q_value)[torch.isfinite(scores.p_value)].all()


def test_a_planted_expert_is_found_first() -> None:
    """Thirty replies, as many as RICE's questions; one expert of 32 follows their `<think>` four times in five.

    Rank 1 in at least 95 of 100 seeds: by nPMI with `<think>`, and by the risk difference `<think>` - `</think>`.
    """
    asked = (("npmi", {"<think>": 1.0}), ("risk_difference", {"<think>": 1.0, "</think>": -1.0}))
    first, significant = [0, 0], [0, 0]
    for seed in range(100):
        given = traces(seed, questions=30)
        found = summary(given, routed(given, seed, tied={(1, 5): made.THINK}, strength=0.8), asked[1][1])
        for place, (method, markers) in enumerate(asked):
            scores = expert_scores(found, markers, method=method, resamples=0)
            first[place] += scores.top(1) == ((LAYERS[1], 5),)
            assert scores.q_value is not None
            significant[place] += float(scores.q_value[1, 5]) <= 0.05
    assert min(first) >= 95, f"{first} of 100"
    assert min(significant) >= 95, f"{significant} of 100"


def test_an_expert_that_never_meets_a_marker_of_weight_minus_one_gains_one() -> None:
    """What RICE's sum does, and why the risk difference finds experts where marks are few (see docs/experts.md)."""
    given = traces(7, questions=4)
    markers = {"<think>": 1.0, "</think>": -1.0}
    found = summary(given, routed(given, 7), markers)
    both, one = (expert_scores(found, asked, resamples=0, null=False) for asked in (markers, {"<think>": 1}))
    never = (both.together[1] == 0) & (both.chosen > 0)
    assert never.sum() > 8
    np.testing.assert_allclose(both.values[never], one.values[never] + 1, atol=1e-6)


@pytest.mark.parametrize("markers", [{"wait": 1.0}, {"wait": 1.0, "<think>": -1.0}])
def test_under_the_null_false_discoveries_stay_within_their_rate(markers: dict[str, float]) -> None:
    """No expert follows any token: the share of 200 runs in which any q is at most .05 is not above .05 but by chance."""
    runs, level = 200, 0.05
    false = 0
    for seed in range(runs):
        given = traces(seed + 1000, questions=6, longest=16, rate=0.2)
        scores = expert_scores(summary(given, routed(given, seed + 1000), markers), markers, resamples=0)
        assert scores.q_value is not None
        false += bool((scores.q_value[torch.isfinite(scores.q_value)] <= level).any())
    assert false <= stats.binom(runs, level).ppf(0.999), f"{false} of {runs}"


def test_the_same_reply_twice_is_no_new_evidence() -> None:
    """Scores, intervals and chances of replies that are all read four times are those of reading them once."""
    once = traces(2, questions=10, rate=0.2)
    ids = routed(once, 2)
    often = [replace(trace, id=f"{trace.item}/{k}", sample=k) for k in range(4) for trace in once]
    one, four = (expert_scores(summary(given, each, {"wait": 1.0}), {"wait": 1.0}, method="rate_ratio", resamples=50) for given, each in ((once, ids), (often, ids * 4)))  # fmt: skip
    for name in ("values", "lower", "upper", "p_value", "q_value"):
        np.testing.assert_allclose(getattr(four, name).numpy(), getattr(one, name).numpy(), rtol=1e-6, atol=1e-12)


# What is refused, and what is said.


def test_groups_have_scores_but_neither_interval_nor_chances() -> None:
    model, run = made.model("qwen3_moe"), made.traces(8)
    markers = {"<think>": 1, "</think>": -1}
    grouped = probes.collect(model, run, recorders=[recorder_for(markers)], keep="group")
    whole = probes.collect(model, run, recorders=[recorder_for(markers)])
    scores = expert_scores(grouped, markers, resamples=0, null=False)
    assert torch.equal(scores.values, expert_scores(whole, markers, resamples=0, null=False).values)
    assert scores.provenance["data_count"] == len(run)
    for asked, words in (
        ({"resamples": 0}, "chances were"),
        ({"null": False}, "an interval over questions were"),
        ({}, "interval over questions and chances"),
    ):
        with pytest.raises(SteerError, match=f"groups.*{words}.*--resamples 0 --no-null"):
            expert_scores(grouped, markers, **asked)


@pytest.mark.parametrize(
    ("markers", "options", "words"),
    [
        ({"<think>": 1, "hence": -1}, {}, r"'hence' stands at none of the \d+ tokens.*leave it out"),
        ({"wait": 1}, {}, "router.count over marker:wait@all.*router_counts"),
        ({}, {}, "no marker was named"),
        ({"<think>,": 1}, {}, "marker:<think>,@all"),
        ({"<think>": 1}, {"method": "lift"}, "no method 'lift'.*npmi"),
        ({"<think>": 1}, {"correction": "no"}, "no correction 'no'.*bh, by"),
        ({"<think>": 1}, {"resamples": -1}, "-1 resamples"),
        ({"<think>": 0}, {}, "'<think>' has the weight 0.*other than 0"),
        ({"<think>": math.nan}, {}, "'<think>' has the weight nan"),
        ({"<think>": math.inf}, {}, "'<think>' has the weight inf"),
    ],
)
def test_bad_requests_are_refused(markers: dict[str, float], options: dict[str, Any], words: str) -> None:
    given = traces(0)
    found = summary(given, routed(given, 0), {"<think>": 1.0, "hence": 1.0})
    with pytest.raises(SteerError, match=f"(?i){words}"):
        expert_scores(found, markers, **options)


def test_another_models_summary_is_refused() -> None:
    given = traces(0)
    with pytest.raises(SteerError, match="shape"):
        expert_scores(summary(given, routed(given, 0), {"<think>": 1.0}), {"<think>": 1}, model=made.model("olmoe"))


def test_a_marker_at_every_token_is_refused() -> None:
    given = [made.trace("q", 0, [], closed=False, prompt=(made.THINK,))]
    found = summary(given, routed(given, 0), {"<think>": 1.0})
    with pytest.raises(SteerError, match="at every one of the 2 tokens"):
        expert_scores(found, {"<think>": 1})


def test_a_models_marks_are_its_first_two_markers() -> None:
    tokenizer = tiny.tokenizer()
    assert marks_as_markers(Marks.from_tokenizer(tokenizer), tokenizer) == {"<think>": 1.0, "</think>": -1.0}
    several = Marks(((made.THINK,), (WAIT, SO)), ((made.CLOSE,),))
    assert marks_as_markers(several, tokenizer) == {"<think>,wait so": 1.0, "</think>": -1.0}
    with pytest.raises(SteerError, match=r"no marks.*--marker"):
        marks_as_markers(Marks(), tokenizer)


def test_variants_are_shown_piece_by_piece() -> None:
    assert resolved("wait so,<think>", tiny.tokenizer()) == (((WAIT, SO), (made.THINK,)), ("wait|so", "<think>"))
    with pytest.raises(SteerError, match="cannot write the marker 'Alternatively'"):
        resolved("Alternatively", tiny.tokenizer())
