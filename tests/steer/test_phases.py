"""Phases against an oracle that reads one token after another and keeps the whole past."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.phases import (
    PHASES,
    Marks,
    PhaseState,
    State,
    advance,
    begin,
    check_phase,
    find_events,
    phase_mask,
    states_of,
)

# Readable tokens: ( and ) are one-token marks, [ ] two-token, { } three-token; letters are text.
OPEN, CLOSE = 1, 2
SPELL = {"<": (1,), ">": (2,), "[": (3, 4), "]": (5, 6), "{": (7, 8, 9), "}": (10, 11, 12)}
ONE = Marks(((1,),), ((2,),))
TWO = Marks(((3, 4),), ((5, 6),))
THREE = Marks(((7, 8, 9),), ((10, 11, 12),))
ALL = Marks(((1,), (3, 4), (7, 8, 9)), ((2,), (5, 6), (10, 11, 12)))


def spell(text: str) -> list[int]:
    """Token ids of a line like `ab<cd>e`; a letter is 20 and up."""
    ids: list[int] = []
    for character in text:
        ids += SPELL.get(character, (20 + ord(character) - ord("a"),))
    return ids


def oracle(tokens: list[int], prompt_length: int, marks: Marks, marks_from: int) -> list[int]:
    """The definition of DESIGN §2, word by word, without tensors or memory of a tail."""
    states = []
    last = None
    for t in range(len(tokens)):
        ending = []
        for side, several in (("open", marks.opening), ("close", marks.closing)):
            for mark in several:
                start = t + 1 - len(mark)
                if start >= marks_from and start >= 0 and tuple(tokens[start : t + 1]) == mark:
                    ending.append((len(mark), side))
        if ending:
            last = max(ending)[1]
        if t < prompt_length - 1:
            states.append(0)
        else:
            states.append({None: 1, "open": 2, "close": 3}[last])
    return states


# (name, marks, tokens, prompt length, marks_from, states written by hand: p prompt, o opening, t thinking, a answer)
TABLE: list[tuple[str, Marks, list[int], int, int, str]] = [
    ("no marks at all", Marks(), spell("abcde"), 2, 0, "poooo"),
    ("prompt of one token", ONE, spell("a<b>c"), 1, 0, "ottaa"),
    ("the usual reply", ONE, spell("abc<de>fg"), 3, 3, "ppotttaaa"),
    ("nothing opened", ONE, spell("abcdef"), 3, 3, "ppoooo"),
    ("never closed", ONE, spell("ab<cdef"), 2, 2, "pottttt"),
    ("closed without opening", ONE, spell("abcd>e"), 2, 2, "poooaa"),
    ("generation prompt opens", ONE, spell("ab<cd>e"), 3, 2, "pptttaa"),
    ("generation prompt opens, one token later", ONE, spell("ab<xcd>e"), 4, 2, "ppptttaa"),
    ("generation prompt opens and closes (thinking off)", ONE, spell("ab<>cd"), 4, 2, "pppaaa"),
    ("mark in the prompt outside the suffix", ONE, spell("a<b>cd<e>f"), 6, 6, "pppppottaa"),
    ("unclosed mark in the question does not count", ONE, spell("a<bcdef"), 4, 3, "pppoooo"),
    ("raw text: all marks of the prompt count", ONE, spell("a<bcd>e"), 4, 0, "pppttaa"),
    ("raw text: closed in the prompt", ONE, spell("a<b>cde"), 5, 0, "ppppaaa"),
    ("closed then reopened", ONE, spell("ab<c>d<e>f"), 2, 2, "pottaattaa"),
    ("two closings", ONE, spell("ab<c>d>e"), 2, 2, "pottaaaa"),
    ("two openings", ONE, spell("ab<c<d>e"), 2, 2, "pottttaa"),
    ("event on the prompt's last token", ONE, spell("ab<"), 3, 2, "ppt"),
    ("two-token marks", TWO, spell("ab[c]d"), 2, 2, "pootttaa"),
    ("half an opening is none", TWO, [20, 21, 3, 22, 4, 23], 2, 2, "pooooo"),
    ("half a closing is none", TWO, [20, 21, 3, 4, 5, 22, 6, 23], 2, 2, "poottttt"),
    ("mark split between prompt and reply", TWO, [20, 21, 3, 4, 22, 5, 6], 3, 2, "ppottta"),
    ("mark begins before the suffix", TWO, [20, 3, 4, 22, 23], 2, 2, "poooo"),
    ("mark begins exactly at the suffix", TWO, [20, 3, 4, 22, 23], 2, 1, "pottt"),
    ("three-token marks", THREE, spell("ab{c}d"), 2, 2, "pooottttaa"),
    ("a false start, then the mark", THREE, [20, 7, 8, 7, 8, 9, 21, 10, 10, 11, 12, 22], 1, 1, "oooootttttaa"),
    ("three kinds mixed", ALL, spell("a<b]c{d}e"), 1, 1, "otttaaaattttaa"),
    ("longer of two that end together: closing", Marks(((2,),), ((1, 2),)), [20, 2, 21, 1, 2, 22], 1, 1, "otttaa"),
    ("longer of two that end together: opening", Marks(((1, 2),), ((2,),)), [20, 1, 2, 21, 2, 22], 1, 1, "oottaa"),
    (
        "the longer lies before the suffix, so the shorter counts",
        Marks(((1, 2),), ((2,),)),
        [20, 1, 2, 21],
        2,
        2,
        "poaa",
    ),
    ("longer of three", Marks(((3,), (1, 2, 3)), ((2, 3),)), [20, 2, 3, 1, 2, 3, 3], 1, 1, "ooaaatt"),
    ("overlapping occurrences of one mark", Marks(((1, 1),), ((2,),)), [20, 1, 1, 1, 2], 1, 1, "ootta"),
    ("marks_from beyond the prompt", ONE, spell("a<b<c"), 1, 3, "ooott"),
]
LETTERS = {"p": State.PROMPT, "o": State.OPENING, "t": State.THINKING, "a": State.ANSWER}


@pytest.mark.parametrize(
    ("name", "marks", "tokens", "prompt", "start", "expected"), TABLE, ids=[row[0] for row in TABLE]
)
def test_table(name: str, marks: Marks, tokens: list[int], prompt: int, start: int, expected: str) -> None:
    assert len(expected) == len(tokens), "the table's own row"
    by_hand = [LETTERS[letter] for letter in expected]
    assert oracle(tokens, prompt, marks, start) == by_hand
    assert states_of(tokens, prompt, marks, start) == by_hand
    for size in (1, 2, 3):  # A mark may be split over chunks.
        assert in_chunks(tokens, prompt, marks, start, [size] * len(tokens)) == by_hand


def in_chunks(tokens: list[int], prompt: int, marks: Marks, start: int, sizes: list[int]) -> list[int]:
    state = begin(marks, [prompt], [start])
    states: list[int] = []
    at = 0
    for size in sizes:
        piece = tokens[at : at + size]
        if not piece:
            break
        ids = torch.tensor([piece])
        state, new = advance(state, marks, ids, torch.ones_like(ids, dtype=torch.bool))
        states += new[0].tolist()
        at += size
    return states


def test_the_table_is_large_enough() -> None:
    assert len(TABLE) >= 25


Sides = tuple[set[tuple[int, ...]], set[tuple[int, ...]]]
some_marks = st.sets(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)


def made_of(sides: Sides) -> Marks:
    """Marks that differ: what both sides drew is dropped, and a side without any gets one that nobody can draw."""
    opening, closing = sides
    return Marks(tuple(opening - closing) or ((1, 1, 1, 2),), tuple(closing - opening) or ((2, 2, 2, 1),))


@given(sides=st.tuples(some_marks, some_marks), data=st.data())
@settings(max_examples=250, deadline=None)
def test_any_split_and_any_padding_give_the_oracles_states(sides: Sides, data: st.DataObject) -> None:
    marks = made_of(sides)
    rows = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=14), min_size=1, max_size=3))
    prompts = [data.draw(st.integers(1, len(row))) for row in rows]
    starts = [data.draw(st.integers(0, prompt)) for prompt in prompts]
    expected = [oracle(row, prompt, marks, start) for row, prompt, start in zip(rows, prompts, starts, strict=True)]
    assert [states_of(row, p, marks, s) for row, p, s in zip(rows, prompts, starts, strict=True)] == expected
    # Every row is laid out with padding wherever it likes, then cut into chunks that all rows share.
    width = max(map(len, rows)) + data.draw(st.integers(0, 4))
    ids = torch.full((len(rows), width), 1)  # Padding looks like a mark and must not be read.
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = sorted(data.draw(st.permutations(range(width)))[: len(row)])
        ids[number, places] = torch.tensor(row)
        real[number, places] = True
    cuts = sorted({0, width, *data.draw(st.lists(st.integers(0, width), max_size=5))})
    state = begin(marks, prompts, starts)
    parts = []
    for left, right in pairwise(cuts):
        state, states = advance(state, marks, ids[:, left:right], real[:, left:right])
        parts.append(states)
    whole = torch.cat(parts, 1)
    assert (whole[~real] == State.PADDING).all()
    assert [whole[number][real[number]].tolist() for number in range(len(rows))] == expected
    assert state.current().tolist() == [row[-1] for row in expected]
    assert state.count.tolist() == [len(row) for row in rows]


def test_left_and_right_padding_prefill_and_decode() -> None:
    rows = [spell("ab<c>d"), spell("abcd<e>f")]
    prompts, starts = [2, 4], [2, 4]
    expected = [oracle(row, p, ONE, s) for row, p, s in zip(rows, prompts, starts, strict=True)]
    prefill = torch.tensor([[0, 0, *rows[0][:2]], rows[1][:4]])
    state, states = advance(
        begin(ONE, prompts, starts), ONE, prefill, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    )
    assert states.tolist() == [[-1, -1, *expected[0][:2]], expected[1][:4]]
    for step in range(4):
        ids = torch.tensor([[rows[0][2 + step]], [rows[1][4 + step]]])
        state, states = advance(state, ONE, ids, torch.ones(2, 1, dtype=torch.bool))
        assert states[:, 0].tolist() == [expected[0][2 + step], expected[1][4 + step]]


def test_rows_may_be_selected_repeated_and_joined() -> None:
    tokens = spell("a[b]c[d")
    half = 3  # In the middle of the first thought.
    ids = torch.tensor([tokens[:half]])
    state, _ = advance(begin(TWO, [1], [1]), TWO, ids, torch.ones_like(ids, dtype=torch.bool))
    fresh = begin(TWO, [2], [0])
    both = state.select(torch.tensor([0, 0])).join(fresh)
    other = spell("a[b]c[")[: len(tokens) - half]
    rest = torch.tensor([tokens[half:], tokens[half:], other])
    _, states = advance(both, TWO, rest, torch.ones_like(rest, dtype=torch.bool))
    expected = oracle(tokens, 1, TWO, 1)[half:]
    assert states[0].tolist() == states[1].tolist() == expected
    assert states[2].tolist() == oracle(other, 2, TWO, 0)


def test_advance_is_pure() -> None:
    state = begin(ALL, [1, 1], [0, 0])
    before = {name: getattr(state, name).clone() for name in PhaseState.__dataclass_fields__}
    ids = torch.tensor([spell("a<b>"), spell("[<a")])
    advance(state, ALL, ids, torch.ones_like(ids, dtype=torch.bool))
    assert all(torch.equal(value, getattr(state, name)) for name, value in before.items())


def naive_thought_start(tokens: list[int], marks: Marks) -> int:
    """The first token of the thought that runs at the end; -1 if none does."""
    start = -1
    for event in find_events(tokens, marks):
        if not event.opens:
            start = -1
        elif start < 0:
            start = event.start
    return start


@given(
    sides=st.tuples(some_marks, some_marks),
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=16),
    size=st.integers(1, 16),
)
@settings(max_examples=150, deadline=None)
def test_the_running_thoughts_start(sides: Sides, tokens: list[int], size: int) -> None:
    marks = made_of(sides)
    state = begin(marks, [1], [0])
    for at in range(0, len(tokens), size):
        ids = torch.tensor([tokens[at : at + size]])
        state, _ = advance(state, marks, ids, torch.ones_like(ids, dtype=torch.bool))
        assert state.thought_start.tolist() == [naive_thought_start(tokens[: at + size], marks)]


def test_events_have_both_ends() -> None:
    found = find_events(spell("a{b]c"), ALL)
    assert [(event.opens, event.start, event.end) for event in found] == [(True, 1, 3), (False, 5, 6)]
    assert find_events([], ALL) == [] and find_events([1, 2], Marks()) == []


def test_an_empty_sequence_has_no_states() -> None:
    assert states_of([], 1, ONE) == []
    assert begin(ONE, [3], [0]).current().tolist() == [State.PADDING]


def test_masks_partition_the_sequence() -> None:
    states = torch.tensor([[-1, 0, 0, 1, 2, 3]])
    count = {phase: int(phase_mask(states, phase).sum()) for phase in PHASES}
    assert count == {"all": 5, "prompt": 2, "opening": 1, "generated": 3, "thinking": 1, "answer": 1}
    assert not phase_mask(states, "all")[0, 0]


def test_what_is_refused() -> None:
    with pytest.raises(SteerError, match="no phase 'reply'"):
        phase_mask(torch.zeros(1, 1, dtype=torch.long), "reply")
    with pytest.raises(SteerError, match="needs marks"):
        check_phase("thinking", Marks())
    for phase in ("all", "prompt", "generated"):
        check_phase(phase, Marks())
    check_phase("thinking", ONE)
    with pytest.raises(ValueError, match=">= 1"):
        begin(ONE, [0], [0])
    with pytest.raises(ValueError, match="1 prompt lengths but 2"):
        begin(ONE, [1], [0, 0])
