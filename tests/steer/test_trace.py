"""One trace: what is filled in, what is refused, from characters to tokens, one line of JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.marks import Marks
from steer.phases import State, states_of
from steer.trace import NAMES, Trace, decode, make_trace, thought, token_span, trace_line
from steer.tracefile import parse_line
from tests.steer.made import refused

MARKS = Marks(((1,), (3, 4)), ((2,), (5, 6)))


class Letters:
    """A tokenizer whose token i writes the i-th of a few strings."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.pieces[i] if i < len(self.pieces) else "x" for i in ids)


def trace(prompt, completion, marks=MARKS, start=0, **given):
    return make_trace(
        item="q", sample=0, prompt="p", prompt_token_ids=prompt, completion_token_ids=completion,
        tokenizer=Letters(), marks=marks, generation_prompt_start=start, **given,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "completion", "start", "span", "closed", "answer_tokens"),
    [
        ([9, 9], [9, 1, 9, 2, 9, 9], 2, (3, 6), True, 2),
        ([9, 9], [3, 4, 9, 5, 6], 2, (2, 7), True, 0),
        ([9, 1], [9, 9, 2, 9], 1, (1, 5), True, 1),  # Opened by the generation prompt.
        ([9, 1, 2], [9], 1, (1, 3), True, 1),  # Opened and closed by it.
        ([1, 9], [9, 9], 2, None, None, None),  # Outside the generation prompt.
        ([9], [1, 9, 9], 1, (1, 4), False, None),
        ([9], [9, 2, 9], 1, None, None, None),  # A closing alone is no thought.
        ([9], [2, 1, 9, 2, 1, 9, 2], 1, (2, 5), True, 3),  # The first thought only.
        ([9], [1, 1, 9, 2], 1, (1, 5), True, 0),
        ([9], [9, 9], 1, None, None, None),
    ],
)
def test_the_thought_is_found(prompt, completion, start, span, closed, answer_tokens):
    made = trace(prompt, completion, start=start)
    assert (made.thinking_span, made.closed, made.answer_tokens) == (span, closed, answer_tokens)
    assert made.thinking_tokens == (None if span is None else span[1] - span[0])
    assert made.id == "q/0" and made.tokens == (*prompt, *completion) and made.prompt_length == len(prompt)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(1, 20), st.integers(0, 3))
def test_the_phase_thinking_covers_the_span_from_the_openings_end_to_before_the_closings_end(tokens, prompt, start):
    prompt = min(prompt, len(tokens))
    found = thought(tokens, MARKS, start)
    states = states_of(tokens, 1, MARKS, start)  # Prompt of one token: every state from 0 on is seen.
    inside = [position for position, state in enumerate(states) if state == State.THINKING]
    if found is None:
        assert inside == []
        return
    (first, end), closed = found
    opening = 1 if tokens[first] == 1 else 2
    assert list(range(first + opening - 1, end - closed)) == [p for p in inside if p < end]


def test_lengths_of_thought():
    closed = trace([9], [1, 9, 2, 9, 9])
    assert closed.thought_length == closed.thinking_tokens == 3
    plain = trace([9, 9], [9, 9, 9, 9], Marks())
    assert plain.thought_length == 4
    assert replace(plain, answer_span=(5, 6)).thought_length == 3
    assert replace(plain, answer_span=(0, 1)).thought_length == 0


def test_the_end_token_is_kept_but_not_written():
    stopped = trace([9], [7, 8], finish_reason="stop", forced=[1], gold="g", group="3")
    assert stopped.completion_token_ids == (7, 8) and stopped.text == "x"
    assert (stopped.forced, stopped.gold, stopped.group) == ((1,), "g", "3")
    assert trace([9], [7, 8], finish_reason="length").text == "xx"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"thinking_span": (0, 9), "thinking_tokens": 9, "closed": True}, "outside its 4 tokens"),
        ({"answer_span": (3, 2)}, "answer_span"),
        ({"answer_span": (-1, 2)}, "answer_span"),
        ({"forced": (3,)}, "forced"),
        ({"thinking_tokens": 3}, "thinking_tokens"),
        ({"thinking_span": (1, 3), "thinking_tokens": 1, "closed": True}, "thinking_tokens"),
        ({"thinking_span": (1, 3), "thinking_tokens": 2}, "closed"),
        ({"closed": False}, "closed"),
    ],
)
def test_contradictions_are_refused(change, word):
    refused(lambda: replace(trace([9], [9, 9, 9]), **change), word)


def test_characters_to_tokens():
    pieces = ["", "the", " answer", " is", " 4", "2", ".\n"]
    made = make_trace(
        item="q", sample=0, prompt="p", prompt_token_ids=[9, 9], completion_token_ids=[1, 2, 3, 4, 5, 6],
        tokenizer=Letters(*pieces), marks=Marks(),
    )  # fmt: skip
    at = made.text.index("42")
    assert made.text == "the answer is 42.\n"
    assert token_span(made, Letters(*pieces), at, at + 2) == (2 + 3, 2 + 5)
    assert token_span(made, Letters(*pieces), 0, 3) == (2, 3)
    assert token_span(made, Letters(*pieces), 1, 2) == (2, 3)  # Part of a token takes the token.
    assert token_span(made, Letters(*pieces), len(made.text) - 1, len(made.text)) == (2 + 5, 2 + 6)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10), st.data())
def test_characters_to_tokens_against_counting(ids, data):
    tokenizer = Letters("", "a", "bc", " d", "  ", "efg", "\n")
    made = make_trace(
        item="q",
        sample=0,
        prompt="p",
        prompt_token_ids=[0],
        completion_token_ids=ids,
        tokenizer=tokenizer,
        marks=Marks(),
    )
    owners = [place for place, token in enumerate(ids) for _ in tokenizer.pieces[token]]
    start = data.draw(st.integers(0, len(owners) - 1))
    end = data.draw(st.integers(start + 1, len(owners)))
    assert token_span(made, tokenizer, start, end) == (1 + owners[start], 2 + owners[end - 1])


def test_a_word_tokenizers_span(tiny):
    tokenizer = tiny("llama").tokenizer
    ids = tokenizer("the answer is 4 2 .")["input_ids"]
    made = make_trace(
        item="q",
        sample=0,
        prompt="p",
        prompt_token_ids=[1],
        completion_token_ids=ids,
        tokenizer=tokenizer,
        marks=Marks(),
    )
    at = made.text.index("4 2")
    start, end = token_span(made, tokenizer, at, at + 3)
    assert decode(tokenizer, made.tokens[start:end]) == "4 2"


texts = st.text(st.characters(exclude_categories=()), max_size=20)  # Half surrogate pairs and line separators too.


@given(texts, texts, st.lists(st.integers(0, 7), max_size=6), st.booleans())
def test_a_line_reads_back(prompt, answer, completion, chat):
    content = [{"role": "user", "content": prompt}] if chat else prompt
    made = replace(
        make_trace(item=answer, sample=3, prompt=content, prompt_token_ids=[1, 9], completion_token_ids=completion, tokenizer=Letters(answer), marks=MARKS),
        answer=answer, correct=True,
    )  # fmt: skip
    line = trace_line(made)
    assert "\n" not in line and "\r" not in line
    assert parse_line(line.encode("utf-8").decode("utf-8")) == made
    assert trace_line(parse_line(line)) == line


def test_the_line_has_the_keys_of_the_design():
    keys = "id item sample prompt prompt_token_ids completion_token_ids text thinking_span closed thinking_tokens answer_span"
    keys += " answer_tokens forced answer gold correct finish_reason group generation_prompt_start"
    line = trace_line(trace([9], [1, 9, 2]))
    assert set(json.loads(line)) == set(keys.split()) == set(NAMES)
    assert line == json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_traces_are_values():
    assert trace([9], [1, 2]) == trace([9], [1, 2]) and isinstance(trace([9], [1]), Trace)
