"""Prompts: rendering by the tokenizer's own template, the reply's start, the thinking switch."""

from __future__ import annotations

import pytest

from steer.marks import Marks
from steer.phases import State, states_of
from steer.prompts import render
from tests.steer.made import refused

CHAT = [{"role": "system", "content": "think"}, {"role": "user", "content": "a = 3"}]


@pytest.fixture
def tokenizer(tiny):
    return tiny("llama").tokenizer


def words(tokenizer, rendered):
    return tokenizer.convert_ids_to_tokens(list(rendered.token_ids))


def test_chat_messages_and_where_the_reply_begins(tokenizer):
    rendered = render(tokenizer, CHAT)
    expected = [
        "<|im_start|>",
        "system",
        "think",
        "<|im_end|>",
        "<|im_start|>",
        "user",
        "a",
        "=",
        "3",
        "<|im_end|>",
        "<|im_start|>",
        "assistant",
    ]
    assert words(tokenizer, rendered) == expected
    assert rendered.generation_prompt_start == len(expected) - 2


def test_the_same_tokens_as_the_template_encodes_itself(tokenizer):
    direct = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(render(tokenizer, CHAT).token_ids) == list(direct)


def test_the_templates_switch(tokenizer):
    off, on, default = (render(tokenizer, CHAT, thinking) for thinking in (False, True, None))
    assert words(tokenizer, off)[-2:] == ["<think>", "</think>"]
    assert on == default and len(off.token_ids) == len(on.token_ids) + 2
    assert off.generation_prompt_start == on.generation_prompt_start
    marks = Marks.from_tokenizer(tokenizer)
    assert states_of(off.token_ids, len(off.token_ids), marks, off.generation_prompt_start)[-1] == State.ANSWER


def test_another_name_of_the_switch(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking", "thinking")
    assert words(tokenizer, render(tokenizer, CHAT, False))[-1] == "</think>"


def test_a_template_without_a_switch_refuses(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert words(tokenizer, render(tokenizer, CHAT)) == ["think", "a", "=", "3", "assistant"]
    for thinking in (True, False):
        refused(
            lambda thinking=thinking: render(tokenizer, CHAT, thinking), "no switch for thinking", "enable_thinking"
        )


def test_a_mark_in_the_question_is_before_the_start(tokenizer):
    rendered = render(tokenizer, [{"role": "user", "content": "<think> a </think>"}])
    marks = Marks.from_tokenizer(tokenizer)
    states = states_of(rendered.token_ids, len(rendered.token_ids), marks, rendered.generation_prompt_start)
    assert states[-1] == State.OPENING


def test_a_template_that_opens_the_thought(tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %} <think>{% endif %}"
    rendered = render(tokenizer, CHAT)
    states = states_of(
        rendered.token_ids, len(rendered.token_ids), Marks.from_tokenizer(tokenizer), rendered.generation_prompt_start
    )
    assert states[-1] == State.THINKING


def test_a_template_without_a_generation_prompt(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rendered = render(tokenizer, CHAT)
    assert rendered.generation_prompt_start == len(rendered.token_ids)


def test_raw_text(tokenizer):
    rendered = render(tokenizer, "a = 3 <think>")
    assert words(tokenizer, rendered) == ["a", "=", "3", "<think>"] and rendered.generation_prompt_start == 0
    turn = tuple(tokenizer("assistant")["input_ids"])
    marks = Marks(((1,),), ((2,),), turn)
    assert render(tokenizer, "user a assistant b", None, marks).generation_prompt_start == 3


def test_what_is_refused(tokenizer):
    refused(lambda: render(tokenizer, "a = 3", True), "raw text", "chat messages")
    refused(lambda: render(tokenizer, ""), "no tokens")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    refused(lambda: render(tokenizer, CHAT), "System role not supported", "system, user")
    tokenizer.chat_template = None
    refused(lambda: render(tokenizer, CHAT), "no chat template", "string")
