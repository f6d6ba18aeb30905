"""Asking the questions of a run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.again import Again, answered, behind
from experiments.evaluate import evaluate
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.prompts import RawText
from steer.traces import Traces
from tests.steer.made import refused


@pytest.fixture(scope="module")
def run(organism: SteerableModel, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    folder: Path = tmp_path_factory.mktemp("again") / "run"
    return evaluate(organism, "chain", out=folder, limit=6, samples=2, seed=3).traces


def test_the_same_model_replies_the_same_and_more_often_where_asked(organism: SteerableModel, run: Traces) -> None:
    again = Again.of(organism, run)
    items = {trace.item for trace in run[:8]}
    told = again.ask(organism, items)
    assert told == [trace for trace in run if trace.item in items]
    more = again.ask(organism, items, samples=3)
    assert [trace for trace in more if trace.sample < 2] == told
    assert len(more) == 12 and all(trace.correct is not None for trace in more)


def test_a_task_is_asked_without_a_folder(organism: SteerableModel, run: Traces) -> None:
    assert list(answered(organism, "chain", limit=6, samples=2, seed=3)) == list(run)
    told = answered(organism, "chain", limit=2)
    assert Again.of(organism, told).ask(organism, [told[0].item]) == [told[0]]


def test_with_a_policy_and_with_a_text_before(organism: SteerableModel, run: Traces) -> None:
    from experiments.think_policies import ThinkingBudget

    again = Again.of(organism, run, "chain")
    items = [run[0].item]
    short = again.ask(organism, items, policy=ThinkingBudget.of(5, organism.marks))
    assert all((trace.thinking_tokens or 0) <= 6 for trace in short)
    polite = again.ask(organism, items, before="please sir")
    question = run[0].prompt[0]["content"]
    assert [trace.prompt for trace in polite] == [[{"role": "user", "content": f"please sir\n{question}"}]] * 2
    assert [trace.gold for trace in polite] == [run[0].gold] * 2


def test_where_a_text_goes() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    assert [message["content"] for message in behind("T", chat)] == ["a", "b", "T\nc", "d"]  # type: ignore[union-attr, index]
    assert chat[2]["content"] == "c"
    raw = behind("T", "question")
    assert raw == "T\nquestion" and isinstance(raw, RawText)
    with pytest.raises(SteerError, match="plain text"):
        behind("T", [{"role": "assistant", "content": "d"}])


def test_runs_that_cannot_be_asked_again(organism: SteerableModel, run: Traces) -> None:
    from dataclasses import replace

    refused(lambda: Again.of(organism, Traces(run, {"sampling": run.meta["sampling"]})), "which task", "steer evaluate")
    refused(lambda: Again.of(organism, Traces(run, {"task": {"name": "chain"}})), "sampling")
    ungolden = Traces([replace(run[0], gold=None)], run.meta)
    refused(lambda: Again.of(organism, ungolden), "no gold answer")
