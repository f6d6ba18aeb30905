import json
from pathlib import Path

import pytest

from experiments.organisms import chain
from experiments.tasks import Graded, Item, named, names, register
from experiments.tasks.gsm8k import gold_of
from experiments.tasks.registry import _KNOWN
from steer.errors import SteerError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data with GSM8K and MATH-500 is absent")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("He pays 9*120=$1080.\n#### 1,080", "1080"),
        ("#### 5", "5"),
        ("so #### 3 and\n#### -12.50", "-12.50"),
        ("#### 1,234,567 ", "1234567"),
        ("#### $70", "70"),
    ],
)
def test_gold_is_the_whole_number_after_the_hashes(answer, gold):
    assert gold_of(answer) == gold


@pytest.mark.parametrize("answer", ["no hashes 5", "#### five", "####", "#### 5 apples"])
def test_a_gold_that_is_no_number_is_refused(answer):
    with pytest.raises(SteerError, match="#### and a number"):
        gold_of(answer)


@needs_data
def test_every_gold_of_gsm8k_is_read():
    items = named(f"gsm8k:{DATA / 'gsm8k_test.jsonl'}").items()
    assert len(items) == 1319 and len({item.id for item in items}) == 1319
    rows = [json.loads(line) for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines()]
    for item, row in zip(items, rows, strict=True):
        assert item.gold == row["answer"].split("####")[1].strip().replace(",", "")
        assert item.question.startswith(row["question"]) and item.question.endswith("\\boxed{}.")
    with_commas = [row for row in rows if "," in row["answer"].split("####")[1]]
    assert len(with_commas) > 10, "otherwise this says nothing about commas"


@needs_data
def test_math500_keeps_its_levels():
    items = named(f"math500:{DATA / 'math500_test.jsonl'}").items(50)
    assert len(items) == 50 and {item.group for item in items} <= set("12345")


@needs_data
def test_the_paper_asks_without_an_instruction():
    bare = named(f"gsm8k:{DATA / 'gsm8k_test.jsonl'}", "").items(1)[0]
    told = named(f"gsm8k:{DATA / 'gsm8k_test.jsonl'}", "Be brief.").items(1)[0]
    assert told.question == f"{bare.question}\nBe brief."


def test_a_task_without_a_file_says_where_to_get_it(monkeypatch):
    monkeypatch.delenv("STEER_DATA", raising=False)
    with pytest.raises(SteerError, match=r"STEER_DATA is not set.*--task gsm8k:FILE.*grade-school-math"):
        named("gsm8k")


def test_the_folder_of_data_can_be_named_once(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_DATA", str(tmp_path))
    with pytest.raises(SteerError, match=r"has no gsm8k_test\.jsonl"):
        named("gsm8k")
    write(tmp_path / "gsm8k_test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    assert named("gsm8k").items() == [
        Item("gsm8k-00001", f"1 + 1?\n{named('gsm8k').options()['instruction']}", "2"),
    ]


def test_lines_of_your_own(tmp_path):
    file = write(
        tmp_path / "mine.jsonl",
        {"question": "one", "answer": 1},
        {"question": "two", "answer": "2", "id": "b", "group": 3, "short_below": 40},
        {"question": "three", "answer": "3", "messages": [{"role": "system", "content": "s"}]},
    )
    first, second, third = named(f"jsonl:{file}", "Box it.").items()
    assert first == Item("000001", "one\nBox it.", "1")
    assert (second.id, second.group, second.short_below) == ("b", "3", 40)
    assert third.content(chat=True) == [{"role": "system", "content": "s"}]
    assert first.content(chat=False) == "one\nBox it."
    assert first.content(chat=True) == [{"role": "user", "content": "one\nBox it."}]


def test_keys_that_nobody_reads_are_said(tmp_path, caplog):
    named(f"jsonl:{write(tmp_path / 'a.jsonl', {'question': 'q', 'answer': '1', 'grup': 4})}")
    assert "the keys grup are not used" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "(?i)line 1 of .* is not JSON"),
        ('{"question": "q", "answer": "1"}\n[1]\n', "(?i)line 2 of .* holds a list"),
        ('{"question": "q"}', "(?i)line 1 of .*answer is missing"),
        ('{"question": "", "answer": "1"}', "question is ''"),
        ('{"question": "q", "answer": true}', "answer is True"),
        ('{"question": "q", "answer": "1", "short_below": "x"}', "short_below is 'x'"),
        ('{"question": "q", "answer": "1", "messages": "hi"}', "messages is no list"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(SteerError, match=message):
        named(f"jsonl:{file}").items()


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(SteerError, match="There is no file"):
        named(f"math500:{tmp_path / 'none.jsonl'}").items()
    with pytest.raises(SteerError, match="no file"):
        named("jsonl")


def test_the_hash_of_a_file_is_part_of_the_run(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "q", "answer": "1"})
    before = named(f"jsonl:{file}").options()
    write(file, {"question": "q", "answer": "2"})
    after = named(f"jsonl:{file}").options()
    assert before["file"] == after["file"] == "a.jsonl" and before["sha256"] != after["sha256"]


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(SteerError, match="one of chain, gsm8k, math500, jsonl"):
        named("gsm9k")
    with pytest.raises(SteerError, match="no split 'train'"):
        named("chain:train")
    with pytest.raises(SteerError, match="instruction"):
        named("chain", "Think!")


def test_a_task_of_your_own_is_registered_once():
    class Echo:
        name = "echo"

        def options(self):
            return {}

        def items(self, limit=None):
            return [Item("1", "say 1", "1")][:limit]

        def grade(self, text, gold, start):
            return Graded(text, text == gold, (0, len(text)))

    try:
        register("echo", lambda argument, instruction: Echo())
        assert "echo" in names() and named("echo:anything").items()[0].gold == "1"
        with pytest.raises(SteerError, match="taken"):
            register("echo", lambda argument, instruction: Echo())
    finally:
        _KNOWN.pop("echo", None)
    with pytest.raises(SteerError, match="two arguments"):
        register("bad", lambda: Echo())
    assert "bad" not in names()


class TestChain:
    def test_fit_and_test_share_no_question(self):
        fit, test = ({item.question for item in named(text).items(300)} for text in ("chain:fit", "chain"))
        assert len(fit) == len(test) == 300 and not fit & test

    def test_two_hundred_without_a_limit(self):
        assert len(named("chain").items()) == 200
        assert named("chain").items(5) == named("chain:test").items()[:5]

    def test_short_is_fewer_than_writing_every_step_once(self):
        for item in named("chain").items(20):
            steps = item.question.count(";") - 1
            assert item.group == str(steps + 1)
            thought = "<think> " + "x = 1 + 1 = 2 ; " * steps + "</think>"
            assert item.short_below == len(thought.split())

    def test_the_answer_follows_the_mark(self):
        text = "<think> b = 3 + 4 = 7 ; </think> b = 7"
        found = named("chain").grade(text, "b = 7", text.index("</think>") + len("</think>"))
        assert found == Graded("b = 7", True, (text.index("b = 7", 30), len(text)))

    def test_without_thinking_the_reply_is_the_answer(self):
        assert named("chain").grade("b = 7", "b = 6", 0) == Graded("b = 7", False, (0, 5))

    @pytest.mark.parametrize("tail", ["", " b = 7 ; c = 8", " b", " the answer is 7"])
    def test_anything_else_is_no_answer(self, tail):
        assert named("chain").grade(f"</think>{tail}", "b = 7", len("</think>")) == Graded()

    def test_an_unclosed_thought_has_no_answer(self):
        assert named("chain").grade("<think> b = 7", "b = 7", None) == Graded()

    def test_every_gold_grades_as_right(self):
        for question in chain.questions(50, chain.TEST):
            assert named("chain").grade(f" {question.answer}", question.answer, 0).correct
