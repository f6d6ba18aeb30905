"""`steer generate`: streams, folders, JSON, and what it refuses."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from steer.cli import app
from steer.cli.typing_out import Typist
from steer.marks import Marks
from steer.prompts import Rendered
from steer.traces import Traces
from tests.steer.test_trace import Letters


@pytest.fixture
def folder(tiny_folder):
    return str(tiny_folder("qwen3"))


def run(*words: str) -> int:
    return app.run(["generate", *words])


def test_one_reply_is_typed_to_the_terminal(folder, capsys):
    assert run(folder, "a = 3", "--max-new-tokens", "8", "--seed", "1", "--temperature", "1.5") == 0
    typed = capsys.readouterr().out
    assert run(folder, "a = 3", "--max-new-tokens", "8", "--seed", "1", "--temperature", "1.5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert " ".join(typed.split()) == " ".join(result["traces"][0]["text"].split())
    assert result["replies"] == 1 and result["meta"]["seed"] == 1 and result["meta"]["subject"] == folder
    assert result["traces"][0]["prompt"] == [{"role": "user", "content": "a = 3"}]


def test_several_replies_without_a_folder(folder, capsys):
    assert run(folder, "a = 3", "-n", "2", "--max-new-tokens", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["[00000/0]", "[00000/1]"]


def test_a_run_folder(folder, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a = 3", "id": "x", "gold": "3"}\n"b = 4"\n')
    out = tmp_path / "run"
    words = (
        folder,
        "--prompts",
        str(prompts),
        "-n",
        "2",
        "--max-new-tokens",
        "6",
        "--temperature",
        "1",
        "--system",
        "think",
        "--out",
        str(out),
        "--json",
    )
    assert run(*words, "--top-p", "0.9", "--top-k", "20", "--policy", "budget:3") == 0
    result = json.loads(capsys.readouterr().out)
    traces = Traces.load(out)
    assert result["replies"] == len(traces) == 4 and result["tokens"] == sum(
        len(t.completion_token_ids) for t in traces
    )
    assert [trace.id for trace in traces] == ["00002/0", "00002/1", "x/0", "x/1"] and traces[2].gold == "3"
    assert traces[0].prompt[0] == {"role": "system", "content": "think"}
    assert traces.meta["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "max_new_tokens": 6}
    assert traces.meta["policy"] == "budget:3" and traces.meta["subject"] == folder
    assert run(*words) == 2
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_thinking_off_and_raw_text(folder, capsys):
    assert run(folder, "a", "--no-thinking", "--max-new-tokens", "2", "--json") == 0
    off = json.loads(capsys.readouterr().out)["traces"][0]
    assert off["thinking_tokens"] == 2 and off["closed"] is True
    assert run(folder, "a <think> b", "--raw", "--max-new-tokens", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["traces"][0]["prompt"] == "a <think> b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "neither PROMPT nor --prompts"),
        (("a", "--prompts", "p.txt"), "both given"),
        (("--prompts", "none.txt"), "no file none.txt"),
        (("a", "--policy", "wait:3"), "budget:N"),
        (("a", "--policy", "budget:0"), "budget is 0"),
        (("a", "--temperature", "-1"), "temperature"),
        (("a", "--top-p", "0"), "top_p"),
        (("a", "--max-new-tokens", "0"), "max-new-tokens"),
        (("a", "--raw", "--no-thinking"), "raw text"),
        (("a", "--raw", "--system", "s"), "raw text"),
    ],
)
def test_what_is_refused(folder, words, told, capsys):
    assert run(folder, *words) == 2
    streams = capsys.readouterr()
    assert told.lower() in streams.err.lower() and streams.out == "" and streams.err.count("\n") == 1


def test_nothing_is_written_when_the_model_is_missing(tmp_path, capsys):
    assert run(str(tmp_path / "none"), "a", "--out", str(tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists() and capsys.readouterr().err


PIECES = ["", "hi", " <think>", " so", " </think>", " 42", "<end>"]
MARKS = Marks(((2,),), ((4,),))


def typed(ids: list[int], prompt: tuple[int, ...] = (1,), start: int = 1, colour: bool = True, tokenizer=None) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=colour, color_system="standard" if colour else None, highlight=False, width=20
    )
    typist = Typist(tokenizer or Letters(*PIECES), MARKS, Rendered(prompt, start), {6}, console)
    for token in ids:
        typist.take(token)
    typist.end()
    return stream.getvalue()


def test_the_thinking_and_both_its_marks_are_dim():
    shown = typed([1, 2, 3, 4, 5, 6])
    dim = [part.split("\x1b[0m")[0] for part in shown.split("\x1b[2m")[1:]]
    assert dim == [" <think>", " so", " </think>"]
    assert shown.endswith(" 42\n") and "<end>" not in shown


def test_a_thought_opened_by_the_prompt_is_dim_from_the_start():
    assert typed([3, 4, 5], prompt=(1, 2)).startswith("\x1b[2m so")


def test_plain_text_where_there_is_no_terminal():
    assert typed([1, 2, 3, 4, 5, 6], colour=False) == "hi <think> so </think> 42\n"


def test_long_lines_are_not_broken():
    assert typed([5] * 30, colour=False) == " 42" * 30 + "\n"


def test_square_brackets_are_text():
    assert typed([1, 2], colour=False, tokenizer=Letters("", "[red]a[/red]", "[x]")) == "[red]a[/red][x]\n"


class Bytes:
    """Two tokens to a character, as byte-level vocabularies have them."""

    def decode(self, ids, **_options):
        return bytes(ids).decode("utf-8", "replace")


def test_characters_wait_until_they_are_whole():
    ids = list("é→a".encode())
    assert typed(ids, colour=False, tokenizer=Bytes()) == "é→a\n"


def test_words_are_spaced_as_the_tokenizer_spaces_them(tiny):
    tokenizer = tiny("llama").tokenizer
    ids = tokenizer("so the answer is 4")["input_ids"]
    assert typed(ids, colour=False, tokenizer=tokenizer) == "so the answer is 4\n"


def test_a_steering_that_breaks_the_model_is_told_plainly(folder, capsys, monkeypatch):
    import steer.generation

    monkeypatch.setattr(
        steer.generation,
        "choose",
        lambda logits, *rest: __import__("steer.sampling", fromlist=["choose"]).choose(logits * torch.nan, *rest),
    )
    assert run(folder, "a") == 2
    assert "smaller coefficient" in capsys.readouterr().err
