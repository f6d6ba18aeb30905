"""Phases between marks, where the prompt or the reply has them, with marks of one to three tokens, split over chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from steer.marks import Marks
from tests.vllm import cases, naive
from tests.vllm.cases import PHASES
from tests.vllm.lab import Ask, Bench

pytestmark = pytest.mark.vllm
Benches = Callable[[str], Bench]


def seen(bench: Bench, ask: Ask) -> set[str]:
    """The phases that a request goes through, from the last token of its prompt on."""
    tokens = [*ask.prompt, *bench.expected(ask).tokens]
    last = len(ask.prompt) - 1
    return {naive.phase_at(tokens, t, last + 1, ask.start, bench.marks) for t in range(last, len(tokens))}


def test_a_model_that_thinks(bench: Benches) -> None:
    """The organism opens and closes its own thought; where thinking is switched off, the template has both marks."""
    made = bench("chain")
    rounds = cases.rounds(made)
    *asks, _ = rounds["thoughts"]
    *answers, chat = made.engine(*rounds.values()).rounds[2]
    made.check(asks, answers)
    assert chat == answers[1], "the template's ending was not found"
    assert set.union(*(seen(made, ask) for ask in asks)) == set(PHASES)


def learnt(bench: Bench, ask: Ask) -> Marks:
    """Take marks from what a random model says: an opening of three tokens, a closing of two behind it, and others."""
    said = bench.expected(ask.plain).tokens
    opening = tuple(said[2:5])
    never = next(token for token in range(7, 40) if token not in said and token not in ask.prompt)
    begun = replace(bench, marks=Marks(opening=(opening,), closing=((never,),)))
    closing = tuple(begun.expected(ask).tokens[9:11])
    return Marks(opening=(opening, bench.marks.opening[0]), closing=((never, *opening), closing))


def test_marks_of_several_tokens(bench: Benches) -> None:
    """In replies and in prompts that end inside a mark or behind one; chunks of 16 tokens split them."""
    plain = bench("qwen2")
    prompt, start = cases.prompts(plain)[2]
    asked = Ask(prompt, "other", 0.5, "thinking", start, tokens=30)
    made = replace(plain, marks=learnt(plain, asked))
    (opening, single), (long, closing) = made.marks.opening, made.marks.closing
    tails = ((), single, opening[:2], opening, (*opening, 9, *closing), (*single, *long[:-1]), (*single, *long))
    asks = [
        replace(asked, prompt=(*prompt, *tail), phase=phase)
        for tail, phases in zip(tails, (PHASES, *[PHASES[1:]] * 6), strict=True)
        for phase in phases
    ]
    (answers,) = made.engine(asks, max_num_batched_tokens=16).rounds
    made.check(asks, answers)
    assert seen(made, asked) == set(PHASES)
