import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from experiments.grading import boxed, equal, final_answer, grade_math, last_number
from steer.errors import SteerError

DATA = Path(__file__).parents[3] / "shared" / "data"


def cut(text, place):
    return None if place is None else text[slice(*place)]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}", "5"),
        (r"first \boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{4", None),
        ("none", None),
    ],
)
def test_the_last_closed_box(text, inside):
    assert cut(text, boxed(text)) == inside


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it costs $1,080.50.", "1,080.50"),
        ("5-3=2", "2"),
        ("that leaves 5-3", "3"),
        ("x = -4", "-4"),
        ("minus −7 degrees", "−7"),
        ("12,34", "34"),
        ("1,000,000 people", "1,000,000"),
        ("a probability of .25", ".25"),
        ("version 2.5.", "2.5"),
        ("nothing here", None),
    ],
)
def test_the_last_number(text, number):
    assert cut(text, last_number(text)) == number


def test_numbers_before_the_start_do_not_count():
    text = "<think>1 2 3</think> I do not know"
    assert grade_math(text, "3", text.index("</think>")).answer is None
    text = r"\boxed{3}</think> the answer is 4"
    assert grade_math(text, "3", text.index("</think>")).answer == "4"


def test_a_formula_counts_where_the_gold_is_no_number():
    text = r"therefore $x = 1$ and finally $\frac{3}{4}$, after 17 steps"
    assert cut(text, final_answer(text)) == r"\frac{3}{4}"
    assert cut(text, final_answer(text, numeric=True)) == "17"


def test_the_place_of_the_answer_is_the_answer():
    text = r"hence \boxed{ 1,080 } dollars"
    found = grade_math(text, "1080")
    assert found.correct and found.span is not None and text[slice(*found.span)] == found.answer == "1,080"


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("1080", "1,080", True),
        ("1080", "1080.00", True),
        ("18", r"\$18", True),
        ("18", r"18\text{ apples}", True),
        ("3", r"\text{3 dollars}", True),
        ("1/3", "0.333", False),
        ("0.5", r"50\%", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
        (r"(1, 2)", r"(2, 1)", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("-4", "4", False),
        ("1080", "1", False),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        (r"\text{Evelyn}", r"\text{Carla}", False),
        ("3", "3 dollars", True),
        ("3", "x = 3", True),
        ("7", "", False),
    ],
)
def test_equality(gold, answer, right):
    assert equal(gold, answer) is right


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data with MATH-500 is absent")
def test_every_gold_of_math500_equals_itself_and_not_its_neighbour():
    golds = [json.loads(line)["answer"] for line in (DATA / "math500_test.jsonl").read_text().splitlines()][::4]
    wrong = [gold for gold in golds if not grade_math(f"so \\boxed{{{gold}}}.", gold).correct]
    assert wrong == []
    pairs = [(a, b) for a, b in pairwise(golds) if a.replace(" ", "") != b.replace(" ", "")]
    mistaken = sum(equal(a, b) for a, b in pairs)
    assert mistaken <= 0.02 * len(pairs)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SteerError, match=r"pip install 'reasoning-steer\[eval\]'"):
        equal("1", "1")
