"""The thinking budget: on a random model with marks of several tokens, and on the bundled organism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import steer
from experiments.think_policies import ThinkingBudget, parse_policy
from steer.generation import generate
from steer.marks import Marks
from steer.phases import State
from steer.policy import PolicyRows
from steer.prompts import Prompt
from steer.sampling import Sampling
from tests.steer.made import refused
from tests.tiny import WORDS

ONE = Marks(((5,),), ((6,),))
TWO = Marks(((5, 20),), ((6, 21),))
CHATS = [Prompt(f"q{i}", [{"role": "user", "content": " ".join("abcdefghij"[: 1 + i])}]) for i in range(6)]
OPENED = [
    Prompt(f"r{i}", " ".join([*"abcdefghij"[: 1 + i], "<think>", WORDS[20]])) for i in range(4)
]  # Thinking already.
PROMPTS = [*CHATS, *OPENED]
OPTIONS = {"sampling": Sampling(1.5, max_new_tokens=40), "seed": 2, "samples": 2}


@pytest.fixture(scope="module", params=[ONE, TWO], ids=["one-token marks", "two-token marks"])
def model(request, tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        for token in {token for mark in (*request.param.opening, *request.param.closing) for token in mark}:
            hf.lm_head.weight[token] *= 2.5
    return steer.wrap(hf, tokenizer, marks=request.param)


def expected(plain, budget, marks):
    """Whether a thought reaches the budget while it is still open, told by its tokens alone."""
    return (
        plain.thinking_tokens is not None
        and plain.thinking_tokens - (len(marks.closing[0]) if plain.closed else 0) >= budget
    )


@pytest.mark.parametrize("tokens", [3, 5, 9])
@pytest.mark.parametrize("end_text", [None, "so then"])
def test_no_thought_exceeds_the_budget_and_untouched_rows_are_untouched(model, tokens, end_text):
    policy = ThinkingBudget.of(tokens, model.marks, end_text, model.tokenizer)
    plain, limited = generate(model, PROMPTS, **OPTIONS), generate(model, PROMPTS, policy=policy, **OPTIONS)
    touched = 0
    for before, after in zip(plain, limited, strict=True):
        if not after.forced:
            assert after == before
            continue
        touched += 1
        first = after.forced[0]
        run = after.forced[: len(policy.ending)]  # A reply may think again, and be closed again.
        assert run == tuple(range(first, first + len(run)))
        assert tuple(after.completion_token_ids[index] for index in run) == policy.ending[: len(run)]
        assert after.completion_token_ids[:first] == before.completion_token_ids[:first]
        if after.closed:
            assert after.thinking_tokens <= tokens + len(policy.ending)
        else:
            assert after.finish_reason in ("length", "stop")
    assert touched > 0
    assert policy.name == limited.meta["policy"] == (f"budget:{tokens}" + (f":{end_text}" if end_text else ""))


def test_exactly_the_thoughts_that_reach_the_budget_are_closed(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        hf.lm_head.weight[[5, 6]] *= 2.5
    model = steer.wrap(hf, tokenizer)
    once = {**OPTIONS, "samples": 4}
    plain = generate(model, PROMPTS, **once)
    limited = generate(model, PROMPTS, policy=ThinkingBudget.of(6, model.marks), **once)
    for before, after in zip(plain, limited, strict=True):
        if (
            expected(before, 6, model.marks)
            and len(before.completion_token_ids) > before.thinking_span[0] - before.prompt_length + 6
        ):
            assert (
                after.closed
                and after.thinking_tokens == 7
                and after.forced[0] == after.thinking_span[1] - 1 - after.prompt_length
            )


def test_a_thought_that_the_prompt_opened_counts_too(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        hf.lm_head.weight[[5, 6]] = 0.0  # Some other token always has a logit above 0.
    model = steer.wrap(hf, tokenizer)
    prompt = Prompt("raw", "a b <think> so so so so")  # Five tokens of thought before the reply begins.
    for tokens, position in ((3, 0), (5, 0), (8, 3)):
        trace = generate(
            model, [prompt], policy=ThinkingBudget.of(tokens, model.marks), sampling=Sampling(0.0, max_new_tokens=12)
        )[0]
        assert trace.completion_token_ids[position] == 6 and trace.forced == (position,)
        assert trace.thinking_tokens == max(tokens, 5) + 1 and trace.closed


def rows(states, thinking, forced_run):
    count = len(states)
    return PolicyRows(
        ("q",) * count, tuple(range(count)), torch.tensor(states), torch.zeros(count, dtype=torch.long),
        torch.tensor(thinking), torch.tensor(forced_run), torch.full((count, 32), -1), ((),) * count,
    )  # fmt: skip


def test_decisions_row_by_row():
    policy = replace(ThinkingBudget.of(4, TWO), ending=(30, 6, 21))
    states = [State.OPENING, State.THINKING, State.THINKING, State.THINKING, State.THINKING, State.ANSWER]
    decision = policy(rows(states, [0, 3, 4, 5, 6, 0], [0, 0, 0, 1, 2, 3]), torch.zeros(6, 40))
    assert decision.forced.tolist() == [-1, -1, 30, 6, 21, -1]
    assert decision.banned is None and decision.stop is None


def test_what_is_refused(tiny):
    tokenizer = tiny("qwen3").tokenizer
    refused(lambda: ThinkingBudget.of(0, ONE), "budget is 0")
    refused(lambda: ThinkingBudget.of(5, Marks()), "no", "--max-new-tokens")
    refused(lambda: ThinkingBudget.of(5, ONE, "wait"), "no tokenizer")
    refused(lambda: ThinkingBudget(5, ()), "closing mark")
    for text in ("budget", "budget:", "budget:x", "budget:-1", "wait:3", "", "budget:1.5"):
        refused(lambda text=text: parse_policy(text, ONE, tokenizer), "no policy", "budget:N")
    refused(lambda: parse_policy("budget:0", ONE), "budget is 0")


def test_the_command_lines_form(tiny):
    tokenizer = tiny("qwen3").tokenizer
    assert parse_policy("budget:12", TWO) == ThinkingBudget(12, (6, 21))
    told = parse_policy("budget:12:the answer", ONE, tokenizer)
    assert told.ending == (*tokenizer("the answer")["input_ids"], 6) and told.name == "budget:12:the answer"


def test_on_the_organism():
    """No thought of the bundled model exceeds the budget, and replies that end earlier are the same tokens."""
    model = steer.load("organism:chain")
    digits = [f"a = {i % 10} ; b = a + {(i + 3) % 10} ; c = b * {2 + i % 7} ; ? c" for i in range(24)]
    prompts = [Prompt(f"{i:02d}", [{"role": "user", "content": text}]) for i, text in enumerate(digits)]
    options = {"sampling": Sampling(0.8, max_new_tokens=150), "seed": 1}
    plain = generate(model, prompts, **options)
    lengths = sorted(trace.thinking_tokens or 0 for trace in plain)
    budget = max(lengths[len(lengths) // 2], 3)
    limited = generate(model, prompts, policy=ThinkingBudget.of(budget, model.marks), **options)
    assert all(trace.closed and trace.thinking_tokens <= budget + 1 for trace in limited if trace.thinking_span)
    same = [after == before for before, after in zip(plain, limited, strict=True)]
    assert same == [not after.forced for after in limited] and 0 < sum(same) < len(same)
