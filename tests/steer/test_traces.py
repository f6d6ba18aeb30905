"""Traces as a sequence and as files."""

from __future__ import annotations

import stat

import pytest
import yaml

from steer.identity import tokenizer_id
from steer.marks import Marks
from steer.traces import Traces, from_text
from tests.steer.made import refused


def names(folder):
    return sorted(each.name for each in folder.iterdir())


QUESTION = [{"role": "user", "content": "a = 3"}]
REPLY = "<think> so a = 3 ; </think> the answer is 3"


@pytest.fixture
def tokenizer(tiny):
    return tiny("llama").tokenizer


@pytest.fixture
def run(tokenizer):
    rows = [
        {
            "prompt": QUESTION,
            "text": REPLY,
            "gold": "3",
            "group": "1",
            "answer": "3",
            "correct": True,
            "finish_reason": "length",
        },
        {"prompt": QUESTION, "text": "<think> wait wait"},
        {"prompt": "a = 3", "text": "the answer is 4", "item": "raw", "sample": 2},
    ]
    return from_text(rows, tokenizer)


def test_plain_text_becomes_traces(run, tokenizer):
    first, unclosed, raw = run
    assert tokenizer.convert_ids_to_tokens(list(first.tokens[slice(*first.thinking_span)])) == [
        "<think>",
        "so",
        "a",
        "=",
        "3",
        ";",
        "</think>",
    ]
    assert first.text == REPLY and first.closed and first.answer_tokens == 4 and first.thinking_tokens == 7
    assert (first.gold, first.group, first.answer, first.correct, first.finish_reason) == (
        "3",
        "1",
        "3",
        True,
        "length",
    )
    assert first.generation_prompt_start == first.prompt_length - 2
    assert unclosed.closed is False and unclosed.thinking_span == (unclosed.prompt_length, len(unclosed.tokens))
    assert raw.thinking_span is None and raw.id == "raw/2" and raw.generation_prompt_start == 0
    assert [each.id for each in run] == ["00000/0", "00001/0", "raw/2"]
    assert run.meta["tokenizer_id"] == tokenizer_id(tokenizer)
    assert run.marks == Marks.from_tokenizer(tokenizer)


def test_samples_of_an_item_are_counted(tokenizer):
    run = from_text([{"prompt": "a", "text": "b", "item": "q"}] * 3, tokenizer)
    assert [each.id for each in run] == ["q/0", "q/1", "q/2"]


@pytest.mark.parametrize(
    ("row", "word"),
    [({"prompt": "a"}, "prompt and text"), ({"prompt": "a", "text": "b", "reply": "c"}, "'reply'"), ({}, "nothing")],
)
def test_rows_that_cannot_be_read(row, word, tokenizer):
    refused(lambda: from_text([{"prompt": "a", "text": "b"}, row], tokenizer), "row 1", word)


def test_a_run_folder_reads_back(run, tokenizer, tmp_path):
    folder = run.save(tmp_path / "deep" / "run")
    assert names(folder) == ["run.yaml", "traces.jsonl"] and names(tmp_path / "deep") == ["run"]
    back = Traces.load(folder, tokenizer)
    assert back == run and back.dropped == 0 and back.lines() == run.lines()
    assert (folder / "traces.jsonl").read_bytes() == run.lines()
    assert stat.S_IMODE((folder / "traces.jsonl").stat().st_mode) == 0o644
    assert Traces.load(folder / "traces.jsonl").meta == run.meta  # The run.yaml beside it.
    refused(lambda: run.save(folder), "exists already")


def test_single_files(run, tmp_path):
    file = run.save(tmp_path / "t.jsonl")
    back = Traces.load(file)
    assert list(back) == list(run) and back.meta == {}
    refused(lambda: run.save(file), "exists already")
    assert run[:1].save(file, overwrite=True) == file and len(Traces.load(file)) == 1


def test_compressed_files(run, tmp_path):
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    file = run.save(tmp_path / "traces.jsonl.zst")
    assert list(Traces.load(file)) == list(run) == list(Traces.load(tmp_path))


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Traces, "lines", full)
    for name in ("run", "t.jsonl"):
        with pytest.raises(OSError, match="No space left"):
            run.save(tmp_path / name)
    assert names(tmp_path) == []


def test_a_cut_run_counts_what_it_dropped(run, tmp_path):
    folder = run.save(tmp_path / "run")
    (folder / "traces.jsonl").write_bytes(run.lines()[:-20])
    back = Traces.load(folder)
    assert list(back) == list(run)[:2] and back.dropped == 1


def test_missing_and_wrong_paths(tmp_path, run):
    refused(lambda: Traces.load(tmp_path / "none"), "there is no")
    refused(lambda: Traces.load(tmp_path), "has no traces.jsonl", "--resume")
    folder = run.save(tmp_path / "run")
    (folder / "run.yaml").write_text("- a\n")
    refused(lambda: Traces.load(folder), "list", "mapping")


def test_empty_runs_are_refused_when_asked(tmp_path):
    empty = Traces([])
    folder = empty.save(tmp_path / "run")
    assert len(Traces.load(folder)) == 0
    refused(lambda: Traces.load(folder).require_some(str(folder)), "has no traces", str(folder))
    refused(lambda: Traces([], dropped=1).require_some(), "cut off")


def test_traces_of_another_tokenizer_are_refused(run):
    assert run.require_tokenizer(run.meta["tokenizer_id"]) is run
    refused(lambda: run.require_tokenizer("f" * 64, "the run x"), "the run x", "another tokenizer")
    assert Traces(run).require_tokenizer("f" * 64)  # Nothing is known of it.


def test_a_sequence(run):
    assert len(run) == 3 and run[-1].item == "raw" and isinstance(run[:2], Traces) and run[:2].meta == run.meta
    assert run != run[:2] and run[:] == run and run != list(run)
    kept = run.where(lambda trace: trace.closed is True)
    assert [trace.id for trace in kept] == ["00000/0"] and kept.meta == run.meta
    assert "3 traces of 3 items, 2 with a thought, 1 closed" in repr(run)


def test_spans_of_all(run):
    thinking, predicts = run.span("thinking"), run.span("predicts_thinking")
    assert thinking[2] == [] == predicts[2]
    assert [[p - 1 for p in positions] for positions in thinking] == predicts
    assert [len(positions) for positions in run.span("marker:wait")] == [0, 2, 0]
    refused(lambda: run.span("thinkng"), "no span 'thinkng'")
    refused(lambda: Traces(list(run), run.meta).span("marker:wait"), "without a tokenizer")


def test_a_frame(run):
    frame = run.frame()
    assert list(frame["id"]) == [trace.id for trace in run]
    assert list(frame["thought_length"]) == [trace.thought_length for trace in run]
    assert set(Traces([]).frame().columns) == set(frame.columns)


def test_notebooks_show_traces_without_markup_of_their_own(tokenizer):
    shown = from_text([{"prompt": "a", "text": "<think> is </think>"}], tokenizer)._repr_html_()
    assert "&lt;think&gt; is" in shown and "<think>" not in shown


def test_run_yaml_is_plain_and_sorted(run, tmp_path):
    folder = run.save(tmp_path / "run")
    text = (folder / "run.yaml").read_text()
    assert yaml.safe_load(text) == run.meta
    keys = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert keys == sorted(keys)


def test_a_histogram_of_the_lengths_says_what_did_not_close(run):
    (axes,) = run.plot().axes
    assert axes.get_title() == "traces: 3, not closed: 1, without a thought: 1"
    assert sum(bar.get_height() for part in axes.containers for bar in part) == 3
    lengths = [trace.thought_length for trace in run]
    assert axes.get_xlim()[0] <= min(lengths) and axes.get_xlim()[1] >= max(lengths)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["closed", "not closed", "without a thought"]
    assert run[:1].plot().axes[0].get_title() == "traces: 1, not closed: 0, without a thought: 0"
    refused(lambda: Traces([]).plot(), "no traces")
