"""Marks: what is refused, what a tokenizer knows, where a raw text prompt begins to count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.marks import PAIRS, Marks
from tests.steer.made import refused


class Vocabulary:
    """A tokenizer that only knows its words."""

    def __init__(self, *words: str) -> None:
        self.words = {word: number for number, word in enumerate(words, start=10)}

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_the_bundled_style_of_marks_is_found(tiny):
    _, tokenizer = tiny("llama")
    marks = Marks.from_tokenizer(tokenizer)
    assert marks == Marks(
        ((tokenizer.convert_tokens_to_ids("<think>"),),), ((tokenizer.convert_tokens_to_ids("</think>"),),)
    )
    assert marks.exist and marks.longest == 1


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_counts_only_where_both_halves_are_tokens(pair):
    assert Marks.from_tokenizer(Vocabulary("a", *pair)) == Marks(((11,),), ((12,),))
    assert not Marks.from_tokenizer(Vocabulary("a", pair[0])).exist
    assert not Marks.from_tokenizer(Vocabulary("a", pair[1])).exist


def test_harmony_channels_take_three_tokens():
    marks = Marks.from_tokenizer(Vocabulary("<|channel|>", "<|message|>", "analysis", "final"))
    assert marks == Marks(((10, 12, 11),), ((10, 13, 11),)) and marks.longest == 3


def test_a_tokenizer_may_know_several_pairs():
    marks = Marks.from_tokenizer(Vocabulary("<think>", "</think>", "[THINK]", "[/THINK]"))
    assert marks.opening == ((10,), (12,)) and marks.closing == ((11,), (13,))


def test_no_marks():
    assert not Marks().exist and Marks().longest == 0 and Marks().by_length(1, 2) == []


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"opening": ((),), "closing": ((1,),)}, "empty"),
        ({"opening": ((-1,),), "closing": ((1,),)}, "negative"),
        ({"opening": ((1,),), "closing": ((1,),)}, "both open and close"),
        ({"opening": ((1,),)}, "one side"),
        ({"closing": ((1,),)}, "one side"),
        ({"opening": ((1,),), "closing": ((2,),), "turn_start": ()}, "empty"),
    ],
)
def test_impossible_marks_are_refused(given, word):
    refused(lambda: Marks(**given), word)


def test_marks_are_ordered_by_length():
    marks = Marks(((1, 2, 3), (4,)), ((5, 6),))
    assert [mark for mark, _ in marks.by_length(1, 2)] == [(4,), (5, 6), (1, 2, 3)]
    assert [kind for _, kind in marks.by_length(1, 2)] == [1, 2, 1]


def test_marks_survive_run_yaml():
    marks = Marks(((1, 2), (3,)), ((4,),), (5, 6))
    assert Marks.from_dict(marks.to_dict()) == marks
    assert Marks.from_dict(Marks().to_dict()) == Marks() == Marks.from_dict({})
    refused(lambda: Marks.from_dict({"openings": []}), "openings")


def test_raw_text_counts_after_the_last_turn_start():
    marks = Marks(((1,),), ((2,),), (7, 8))
    assert marks.raw_text_start([3, 7, 8, 4, 7, 8, 5]) == 6
    assert marks.raw_text_start([7, 8]) == 2
    assert marks.raw_text_start([8, 7, 3]) == 0  # None there: everything counts.
    assert Marks(((1,),), ((2,),)).raw_text_start([7, 8, 3]) == 0


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_raw_text_start_against_string_search(prompt, turn):
    text, needle = "".join(map(str, prompt)), "".join(map(str, turn))
    found = text.rfind(needle)
    assert Marks(turn_start=tuple(turn)).raw_text_start(prompt) == (0 if found < 0 else found + len(turn))
