"""Reading trace files: cut ends, bad lines, compression."""

from __future__ import annotations

import json
import logging

import pytest

from steer import tracefile
from steer.marks import Marks
from steer.trace import make_trace, trace_line
from steer.tracefile import parse_line, read_traces
from tests.steer.made import refused
from tests.steer.test_trace import Letters


def traces(count: int):
    return [
        make_trace(
            item=f"q{i}",
            sample=0,
            prompt="p\u2028\u0085",
            prompt_token_ids=[i],
            completion_token_ids=[1, 2, i],
            tokenizer=Letters(),
            marks=Marks(),
        )
        for i in range(count)
    ]


def lines(count: int) -> bytes:
    return "".join(f"{trace_line(each)}\n" for each in traces(count)).encode()


def test_whole_files_read_back(tmp_path):
    file = tmp_path / "traces.jsonl"
    for text in (lines(3), lines(3).rstrip(b"\n"), lines(3) + b"\n\n"):
        file.write_bytes(text)
        assert read_traces(file) == (traces(3), 0)
    file.write_bytes(b"")
    assert read_traces(file) == ([], 0)


def test_a_cut_anywhere_in_the_last_line_loses_that_line_only(tmp_path, caplog):
    file = tmp_path / "traces.jsonl"
    whole = lines(3)
    begins = len(lines(2))
    for end in range(begins + 1, len(whole) - 1):
        file.write_bytes(whole[:end])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_traces(file) == (traces(2), 1)
        assert "line 3 was cut off" in caplog.text and "2 before it" in caplog.text


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"id": "a", \n', ("line 2", "not JSON")),
        (b"\n", ("line 2", "empty")),
        (b"[1]\n", ("line 2", "list")),
        (b"\xff\n", ("line 2", "UTF-8")),
    ],
)
def test_a_bad_line_in_the_middle_is_an_error(tmp_path, bad, words):
    file = tmp_path / "traces.jsonl"
    first, *rest = lines(3).splitlines(keepends=True)
    file.write_bytes(first + bad + b"".join(rest))
    refused(lambda: read_traces(file), *words, str(file))


def test_the_last_line_is_only_forgiven_for_being_cut(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_bytes(lines(1) + b'{"id": "a"}')
    refused(lambda: read_traces(file), "line 2", "lacks")
    file.write_bytes(lines(1) + b"junk")
    refused(lambda: read_traces(file), "line 2", "not JSON")


def test_an_id_twice_is_an_error(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_bytes(lines(2) + lines(1))
    refused(lambda: read_traces(file), "lines 1 and 3", "q0/0")


def change(**values):
    return json.dumps({**json.loads(trace_line(traces(1)[0])), **values})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (change(lenght=3), ("'lenght'",)),
        (json.dumps({"id": "a"}), ("lacks item, sample, prompt",)),
        (change(id=3), ("id", "text")),
        (change(sample=True), ("sample", "whole number")),
        (change(sample=0.5), ("sample", "whole number")),
        (change(prompt=[1]), ("prompt", "messages")),
        (change(prompt_token_ids="12"), ("prompt_token_ids", "list")),
        (change(prompt_token_ids=[1, None]), ("prompt_token_ids", "list")),
        (change(thinking_span=[1]), ("thinking_span", "[start, end]")),
        (change(thinking_span=[1, 2, 3]), ("thinking_span",)),
        (change(answer_span=[0, 99]), ("answer_span", "outside")),
        (change(finish_reason="eos"), ("finish_reason", "stop, length, policy")),
        (change(correct="yes"), ("correct", "true, false or null")),
        (change(forced=None), ("forced",)),
        ("nonsense", ("not JSON",)),
        ("3", ("int", "object")),
    ],
)
def test_junk_is_refused(line, words):
    refused(lambda: parse_line(line), *words)


def test_every_field_has_a_check():
    assert set(tracefile._CHECKS) == set(tracefile.NAMES)


def test_the_least_line_is_enough():
    least = {"id": "a/0", "item": "a", "sample": 0, "prompt": "p", "prompt_token_ids": [1], "completion_token_ids": []}
    made = parse_line(json.dumps(least))
    assert made.thinking_span is None and made.forced == () and made.text == "" and made.correct is None


def test_compressed_files(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    file = tmp_path / "traces.jsonl.zst"
    packed = zstandard.ZstdCompressor().compress(lines(50))
    file.write_bytes(packed)
    assert read_traces(file) == (traces(50), 0)
    half = len(lines(25)) + 10
    file.write_bytes(zstandard.ZstdCompressor().compress(lines(50)[:half]))
    assert read_traces(file) == (traces(25), 1)
    parts = [zstandard.ZstdCompressor().compress(line) for line in lines(3).splitlines(keepends=True)]
    file.write_bytes(b"".join(parts))  # Several frames, as a writer that appends makes them.
    assert read_traces(file) == (traces(3), 0)


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(tracefile, "import_module", missing)
    (tmp_path / "traces.jsonl.zst").write_bytes(b"(compressed)")
    refused(lambda: read_traces(tmp_path / "traces.jsonl.zst"), "zstandard is not installed", "pip install")
