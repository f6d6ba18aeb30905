"""A run folder read back: the figures as words, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest

from experiments.run import Run, items_text, thresholds
from experiments.tasks import Item
from steer.errors import SteerError
from tests.experiments.made import run


@pytest.fixture
def folder(small_demo, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(small_demo.fit.folder, tmp_path / "run"))


def test_the_figures_are_what_pandas_finds_in_the_lines(folder):
    """Read by another program, from the files alone."""
    lines = pandas.read_json(folder / "traces.jsonl", lines=True)
    items = pandas.read_json(folder / "items.jsonl", lines=True).set_index("id")
    found = json.loads((folder / "summary.json").read_text())
    closed = lines[lines.closed]
    assert found["replies"] == len(lines) and found["questions"] == lines.item.nunique()
    assert found["accuracy"]["value"] == pytest.approx(lines.correct.mean(), abs=1e-6)
    assert found["thoughts"]["closed"]["value"] == pytest.approx(lines.closed.mean(), abs=1e-6)
    lengths = closed.thinking_span.map(lambda span: span[1] - span[0])
    assert found["thinking_tokens"]["mean"]["value"] == pytest.approx(lengths.mean(), abs=1e-6)
    for share, value in found["thinking_tokens"]["quantiles"].items():
        assert value == pytest.approx(lengths.quantile(float(share)))
    short = lengths < closed.item.map(items.short_below)
    assert found["thoughts"]["short"]["value"] == pytest.approx(short.mean(), abs=1e-6)
    for group, rows in lines.groupby("group"):
        assert found["groups"][str(group)]["accuracy"] == pytest.approx(rows.correct.mean(), abs=1e-6)
    order = closed.assign(length=lengths).sort_values("length", kind="stable")
    count = int(0.2 * len(order))
    last = order.length.iloc[count - 1]
    sure, tied = order[order.length < last], order[order.length == last]
    expected = (sure.correct.sum() + (count - len(sure)) * tied.correct.mean()) / count
    assert found["accuracy_of_shortest"]["0.2"]["value"] == pytest.approx(expected, abs=1e-6)


def test_what_is_missing_is_named(folder):
    (folder / "summary.json").unlink()
    with pytest.raises(SteerError, match=r"no summary\.json.*--resume"):
        Run.load(folder)
    (folder / "traces.jsonl").unlink()
    with pytest.raises(SteerError, match=r"no traces\.jsonl"):
        Run.load(folder)
    with pytest.raises(SteerError, match="There is no"):
        Run.load(folder / "nowhere")


def test_a_run_of_generate_has_no_figures(folder):
    (folder / "items.jsonl").unlink()
    with pytest.raises(SteerError, match=r"no items\.jsonl"):
        Run.load(folder)


def test_thresholds_stand_beside_the_questions():
    items = [Item("b", "?", "2", "5", 34), Item("a", "?", "1")]
    text = items_text(items)
    assert [json.loads(line)["id"] for line in text.splitlines()] == ["a", "b"]
    assert "?" not in text and thresholds(text) == {"b": 34}
    with pytest.raises(SteerError, match="unknown key 'short_bellow'"):
        thresholds('{"id": "a", "gold": "1", "group": null, "short_bellow": 3}\n')


def test_the_words_hold_the_figures():
    made = run([10, 20, None, 40], [True, False, True, True], {"q000": 15, "q001": 15, "q003": 15})
    said = dict(made.rows())
    assert said["accuracy"].startswith("75.0% (") and said["questions x samples"] == "4 x 1"
    assert said["thinking tokens, mean"].startswith("23.3 (")
    assert said["median, 10th and 90th percentile"] == "20, 12, 36"
    assert said["replies without a finished thought"] == "1 of 4, left out of lengths"
    assert said["short thoughts"].startswith("33.3% (")
    assert str(made).count("\n") == len(made.rows()) - 1
    assert made._repr_html_().count("<tr>") == len(made.rows())


def test_a_model_that_never_stops_has_figures_too():
    made = run([None, None], [False, False])
    assert made.mean_thinking_tokens is None and made.accuracy == 0.0
    assert "accuracy" in str(made) and "short thoughts" not in str(made)


@pytest.mark.effects
def test_two_samplers_find_the_same_organism(organism, tmp_path):
    """Our sampler and grader against the organism's own, on the same questions: figures within their noise."""
    from experiments.evaluate import evaluate
    from experiments.organisms import chain, sample

    ours = evaluate(organism, "chain", out=tmp_path / "run", limit=192, samples=2, seed=11)
    theirs = sample.run(organism.hf, chain.questions(192, chain.TEST), (21, 22))
    right = np.array([reply.correct for reply in theirs]).reshape(2, -1).mean(0)
    lengths = np.array([reply.length for reply in theirs]).reshape(2, -1).mean(0)
    mine = ours.replies
    for name, figure, other in (("accuracy", mine.correct, right), ("length", mine.length, lengths)):
        values = np.array(mine.table(figure), dtype=float).mean(1)
        error = np.sqrt(values.var() / len(values) + other.var() / len(other))
        assert abs(values.mean() - other.mean()) < 3 * error, name
        assert abs(values.mean() - other.mean()) < 0.1 * other.mean(), name
