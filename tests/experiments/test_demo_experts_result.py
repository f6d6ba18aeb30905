"""Findings on experts from hand-made runs: differences against naive rewrites, and results that went wrong."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments import expert_charts, expert_wording
from experiments.demo_experts import ExpertPlan
from experiments.demo_experts_result import Scaled
from experiments.expert_report import render
from steer.errors import SteerError
from tests.experiments.made_experts import AGREEMENT, PLAN, QUESTIONS, random_run, result, scores


def correct(run) -> np.ndarray:
    """One number per question, in order."""
    return np.array([float(bool(trace.correct)) for trace in run.traces])


def drawn(values: np.ndarray) -> tuple[float, float]:
    """Ends of the bootstrap interval of a mean over questions, drawn by indices."""
    rng = np.random.default_rng(7)
    means = [values[rng.integers(QUESTIONS, size=QUESTIONS)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def said(name: str, **changes) -> str:
    """One paragraph on a changed result, with ordinary spaces."""
    return getattr(expert_wording, name)(result(**changes)).replace("\u00a0", " ")


def test_changes_and_what_lies_beyond_the_others_are_paired():
    made = result()
    after, before = correct(made.found.at(4.0)), correct(made.baseline)
    low, high = drawn(after - before)
    found = made.change(made.found, 4.0).accuracy
    assert found.value == pytest.approx((after - before).mean())
    assert abs(found.low - low) < 0.03 and abs(found.high - high) < 0.03
    others = np.mean([correct(control.at(64.0)) for control in made.controls], axis=0)
    gap = correct(made.found.at(64.0)) - others
    beyond = made.beyond(64.0)
    assert beyond.value == pytest.approx(gap.mean())
    assert abs(beyond.low - drawn(gap)[0]) < 0.03
    same = made.change(made.found, 1.0).accuracy
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_object_is_plain_and_complete():
    made = result()
    plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert plain["experts"]["chosen"] == plain["patch"]["experts"] == plain["experts"]["planted"]
    assert plain["scaling"]["betas"] == list(PLAN.betas) and len(plain["scaling"]["changes"]) == 4
    assert [control["kind"] for control in plain["scaling"]["controls"]] == ["random", "matched"]
    assert set(plain["scaling"]["accuracy_beyond_controls"]) == {"4", "64"}
    assert plain["scaling"]["accuracy"][1] == plain["baseline"]["accuracy"] == made.baseline.accuracy
    assert plain["patch"]["replies_as_the_hook"] == plain["patch"]["replies"] == QUESTIONS
    assert len(plain["experts"]["rows"]) == 7, "an expert that no token chose has no score"
    assert plain["twin"]["scaling"]["changes"][1]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_what_was_planted_and_found_is_said():
    words = {name: said(name) for name in ("finding", "scaling", "controls", "editing", "twin")}
    assert "are (3, 1) with a score of 2.00 (95 % interval 1.95 to 2.05) and (2, 0) with" in words["finding"]
    assert "They are the 2 that were planted." in words["finding"] and "the next, (2, 2), has 0.50" in words["finding"]
    assert "2 experts go with the marks" in words["finding"] and "score too" not in words["finding"]
    assert "every thought closes" in words["scaling"] and "at 64 by +" in words["scaling"]
    assert "accuracy changes by 0 points" in words["controls"] and "clear of zero" not in words["controls"]
    assert "beyond their mean by +" in words["controls"] and "chance" not in words["controls"]
    assert "every reply is that of the hook, token for token" in words["editing"]
    assert "No factor makes it clearly better" in words["twin"] and "pass the same" in words["twin"]


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ([[3, 1], [3, 3]], "Planted were (3, 1) and (3, 3): 1 of them is among these."),
        ([[2, 3], [3, 3]], "Planted were (2, 3) and (3, 3): none of them are among these."),
        ([[2, 0], [3, 1], [3, 2]], "2 of them are among these."),
    ],
)
def test_what_was_planted_and_not_found_is_said(planted, words):
    card = {"planted": {"experts": planted}}
    assert words in said("finding", card=card)
    assert "lanted" not in said("finding", card={"planted": None})


def test_ties_and_scores_of_chance_are_said():
    tied = said("finding", scores=scores(2.0, 1.9))
    assert "(2, 2) has the last one's score too: the choice was made by number" in tied
    assert "no experts go with the marks" in said("finding", scores=scores(chance=0.3))


def test_a_control_that_does_as_well_is_said():
    made = result()
    good = tuple(replace(control, runs=made.found.runs[1:]) for control in made.controls)
    words = said("controls", controls=good)
    assert "That of random pair 1 and matched pair is clear of zero, so a change by itself proves nothing." in words
    assert "+0 points, 95 % interval +0 to +0, which cannot be told from chance" in words


def test_a_twin_that_gains_is_said():
    made = result()
    gained = replace(made.twin.own, runs=(made.twin.own.plain, random_run(52, 0.98)))
    words = said("twin", twin=replace(made.twin, own=gained))
    assert "It is better at 4, although nothing was planted" in words and "No factor" not in words
    words = said("twin", twin=replace(made.twin, scores=scores(1.2, 0.4, 0.3)))
    assert "do not pass the same" in words


def test_frequent_experts_spoil_more_only_where_that_is_so():
    more = "chosen by more tokens than those found"
    assert more in said("controls")
    made = result()
    rare = (*made.controls[:-1], replace(made.controls[-1], experts=((2, 0), (3, 1))))
    assert more not in said("controls", controls=rare)


def test_a_broken_model_is_told_and_drawn():
    dead = random_run(30, 0.0, 0, 1.0)
    made = result()
    runs = (*made.found.runs[:-1], dead)
    failed = replace(AGREEMENT, passed=False, bytes_equal=None, max_abs_logit_difference=None, floor=None)
    made = replace(made, found=replace(made.found, runs=runs), edited=random_run(3, 0.97, 20), agreement=failed)
    plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert plain["scaling"]["mean_thinking_tokens"][-1] is None
    assert plain["patch"]["replies_as_the_hook"] == 0
    words = " ".join(made.sentences())
    assert "DO NOT agree" in words and "not known" in words and f"{QUESTIONS} of {QUESTIONS} replies DIFFER" in words
    assert "at least 0\u00a0% of the thoughts close" in words
    page = render(made)
    assert "DISAGREE" in page and not re.search(r"\bnan\b|None", page)


def test_names_in_the_page_are_text():
    hostile = "<script>alert(1)</script>"
    page = render(result(model=hostile))
    assert hostile not in page and "&lt;script&gt;" in page and "&lt;think&gt;" in page


def test_factors_stand_a_doubling_apart_and_zero_stands_alone():
    places = [expert_charts.place(beta) for beta in ExpertPlan().betas]
    assert places == [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0]
    assert [expert_charts.factor(at) for at in places] == ["0", "¼", "½", "1", "2", "4", "16", "64"]


def test_chances_are_written_as_far_as_they_are_known():
    assert [expert_charts.chance(value) for value in (0.0312, 1e-9, 1.0, None)] == ["0.031", "below 0.001", "1.000", "not known"]  # fmt: skip
    table = expert_charts.score_rows(scores())
    assert table[0] == {
        "expert": "3.1", "score": "2.00\u00a0(1.95\u00a0to\u00a02.05)", "q": "below 0.001", "share": "2\u00a0%",
        "at <think>": "50\u00a0%", "at </think>": "0\u00a0%",
    }  # fmt: skip


def test_every_run_stands_in_the_table():
    made = result()
    rows = expert_charts.change_rows(made)
    assert [name for name, *_ in rows] == ["the experts found", "random pair 1", "matched pair", "the twin's own experts"]  # fmt: skip
    assert [row["beta"] for row in rows[0][2]] == ["0", "1", "4", "64"] and rows[0][2][1]["accuracy_change"] == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"betas": (0.0, 4.0, 64.0)},
        {"control_betas": (1.0, 16.0)},
        {"twin_betas": (4.0, 1.0)},
        {"edited": 8.0},
        {"control_betas": (1.0, 4.0)},
    ],
)
def test_plans_that_could_not_be_compared_are_refused(changes):
    with pytest.raises(SteerError):
        replace(ExpertPlan(), **changes)
    assert ExpertPlan().steps == 8 + 7 + 3 * 4 + 3


def test_a_run_is_found_by_its_factor():
    scaled = Scaled("x", "found", ((0, 0),), (0.0, 1.0), (random_run(1), random_run(2)))
    assert scaled.at(0.0) is random_run(1) and scaled.plain is random_run(2)
