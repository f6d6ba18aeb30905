"""Files of prompts."""

from __future__ import annotations

import json

import pytest

from steer.promptfile import as_message, read_prompts
from steer.prompts import Prompt
from tests.steer.made import refused


def test_plain_text_has_a_prompt_per_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("first line\r\n\n  \nthird \u2028 line".encode())
    assert read_prompts(file) == [Prompt("00001", "first line"), Prompt("00004", "third \u2028 line")]


def test_objects_texts_and_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = ["a text", {"prompt": "b", "id": 7, "group": 4, "gold": 12}, {"messages": chat, "id": "x"}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_prompts(file) == [Prompt("00001", "a text"), Prompt("7", "b", "4", "12"), Prompt("x", chat)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ("line 2", "not JSON")),
        ("3", ("line 2", "int")),
        ('{"promt": "a"}', ("line 2", "'promt'")),
        ('{"id": "a"}', ("line 2", "no prompt")),
        ('{"prompt": "a", "messages": [{}]}', ("line 2", "prompt and messages")),
        ('{"messages": "a"}', ("line 2", "list of objects")),
        ('{"prompt": ["a"]}', ("line 2", "text")),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    file = tmp_path / "p.jsonl"
    file.write_text(f'"good"\n{line}\n')
    refused(lambda: read_prompts(file), *words)


def test_missing_empty_and_binary_files(tmp_path):
    refused(lambda: read_prompts(tmp_path / "none.txt"), "no file")
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(lambda: read_prompts(tmp_path / "empty.txt"), "no prompts")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_prompts(tmp_path / "b.txt"), "UTF-8")
    refused(lambda: read_prompts(tmp_path), "no file")


def test_a_text_becomes_a_message_where_there_is_a_template(tiny):
    tokenizer = tiny("llama").tokenizer
    user = {"role": "user", "content": "hi"}
    assert as_message("hi", tokenizer) == [user]
    assert as_message("hi", tokenizer, system="be brief") == [{"role": "system", "content": "be brief"}, user]
    assert as_message("hi", tokenizer, raw=True) == "hi"
    refused(lambda: as_message("hi", tokenizer, raw=True, system="s"), "raw text")
    tokenizer.chat_template = None
    assert as_message("hi", tokenizer) == "hi"
