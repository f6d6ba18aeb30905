"""vLLM's budget against ours, on replies that a naive sampler writes under our policy; what differs is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.think_policies.budget import ThinkingBudget
from experiments.think_policies.minimum import MinimumThinking
from steer.backends.vllm.budget import budget_of, check_prompt, forced
from steer.errors import SteerError
from steer.marks import Marks

OPEN, CLOSE = 3, 4
MARKS = Marks(((OPEN,),), ((CLOSE,),))
TOKENS = st.lists(st.sampled_from([OPEN, CLOSE, 7, 8]), max_size=24)


def written(prompt: list[int], wished: list[int], start: int, budget: int) -> tuple[list[int], list[int]]:
    """What our policy makes of wishes, one at a time, and where it wrote: the definition, token by token."""
    tokens, wrote = list(prompt), []
    for number, wish in enumerate(wished):
        begun = None
        for at, token in enumerate(tokens):
            if at >= start and token == OPEN and begun is None:
                begun = at
            if at >= start and token == CLOSE:
                begun = None
        over = begun is not None and len(tokens) - begun >= budget
        wrote += [number] if over else []
        tokens.append(CLOSE if over else wish)
    return tokens, wrote


def in_pairs(reply: list[int], thinks: bool) -> bool:
    """Whether a reply never closes what it did not open and opens afterwards."""
    stray = False
    for token in reply:
        if token == OPEN and stray:
            return False
        stray = stray or (token == CLOSE and not thinks)
        thinks = True if token == OPEN else False if token == CLOSE else thinks
    return True


@given(st.booleans(), TOKENS, st.integers(1, 9))
def test_forced_tokens_are_those_of_our_policy(opened: bool, wished: list[int], budget: int) -> None:
    prompt = [7, 8, OPEN] if opened else [7, 8]
    tokens, wrote = written(prompt, wished, 0, budget)
    if in_pairs(tokens[len(prompt) :], opened):
        assert list(forced("a/0", tokens, len(prompt), 0, MARKS, budget)) == wrote
    else:
        with pytest.raises(SteerError, match="a/0 closes a thought"):
            forced("a/0", tokens, len(prompt), 0, MARKS, budget)


@given(st.integers(1, 6))
def test_a_thought_that_runs_over_is_found(budget: int) -> None:
    tokens = [7, OPEN, *[8] * budget, CLOSE]
    with pytest.raises(SteerError, match=f"run over its budget of {budget}"):
        forced("a/0", tokens, 1, 0, MARKS, budget)


@given(TOKENS.filter(bool), st.integers(0, 24))
def test_a_prompt_is_let_in_where_both_see_the_same_thought(prompt: list[int], start: int) -> None:
    start = min(start, len(prompt))
    begun = None
    for at in range(start, len(prompt)):
        if prompt[at] == OPEN and begun is None:
            begun = at
        begun = None if prompt[at] == CLOSE else begun
    opens = [at for at, token in enumerate(prompt) if token == OPEN]
    closes = [at for at, token in enumerate(prompt) if token == CLOSE]
    theirs = opens[-1] if opens and opens[-1] > max(closes, default=-1) else None
    if begun == theirs:
        check_prompt("a", prompt, start, MARKS)
    else:
        with pytest.raises(SteerError, match="marks around thinking in its text"):
            check_prompt("a", prompt, start, MARKS)


def test_only_a_plain_budget_over_plain_marks_is_vllms() -> None:
    assert budget_of(None, MARKS, True) is None
    assert budget_of(ThinkingBudget.of(7, MARKS), MARKS, True) == 7
    for policy in (MinimumThinking.of(5, MARKS), ThinkingBudget(7, (8, CLOSE), "Time is up")):
        with pytest.raises(SteerError, match="HF back end"):
            budget_of(policy, MARKS, True)
    with pytest.raises(SteerError, match="of one token each"):
        budget_of(ThinkingBudget.of(7, MARKS), MARKS, False)
