"""The least length of a thought: on random models with marks of one and two tokens, and of the harmony kind."""

from __future__ import annotations

import pytest
import torch

import steer
from experiments.think_policies import MinimumThinking, parse_policy
from steer.generation import generate
from steer.marks import Marks
from steer.phases import State
from steer.policy import PolicyRows
from steer.prompts import Prompt
from steer.sampling import Sampling
from tests.steer.made import refused
from tests.tiny import WORDS

ONE = Marks(((5,),), ((6,),))
TWO = Marks(((5, 20),), ((5, 21),))  # They differ in their second token only, as those of the harmony format.
CHATS = [Prompt(f"q{i}", [{"role": "user", "content": " ".join("abcdefghij"[: 1 + i])}]) for i in range(4)]
OPENED = [Prompt(f"r{i}", " ".join([*"abcdefghij"[: 1 + i], "<think>", WORDS[20]])) for i in range(8)]
PROMPTS = [*CHATS, *OPENED]  # Half of them think already.
OPTIONS = {"sampling": Sampling(1.5, max_new_tokens=40), "seed": 2, "samples": 2}


@pytest.fixture(scope="module", params=[ONE, TWO], ids=["one-token marks", "marks that differ in the second token"])
def model(request, tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        for token in {token for mark in (*request.param.opening, *request.param.closing) for token in mark} | {2}:
            hf.lm_head.weight[token] *= 3.0
    return steer.wrap(hf, tokenizer, marks=request.param)


@pytest.mark.parametrize("tokens", [4, 9, 30])
def test_no_thought_closes_before_the_minimum_and_nothing_changes_before_it_opens(model, tokens):
    policy = parse_policy(f"min:{tokens}", model.marks, model.tokenizer)
    plain, held = generate(model, PROMPTS, **OPTIONS), generate(model, PROMPTS, policy=policy, **OPTIONS)
    width = len(model.marks.closing[0])
    touched = 0
    for before, after in zip(plain, held, strict=True):
        assert not after.forced
        if after.closed:
            assert after.thinking_tokens >= tokens + 1
        elif after.closed is False:
            assert after.finish_reason == "length" or after.thinking_tokens > tokens
        start = len(before.completion_token_ids) if before.closed is None else max(before.thinking_span[0] + width - before.prompt_length, 0)  # fmt: skip
        assert after.completion_token_ids[:start] == before.completion_token_ids[:start]
        touched += after != before
    assert touched
    assert policy.name == held.meta["policy"] == f"min:{tokens}"


def test_bans_row_by_row():
    last = torch.full((5, 32), -1)
    last[3, -1] = 5
    thinking = torch.tensor([0, 3, 4, 3, 0])
    states = torch.tensor([State.OPENING, State.THINKING, State.THINKING, State.THINKING, State.ANSWER])
    rows = PolicyRows(
        ("q",) * 5, (0,) * 5, states, thinking, thinking, torch.zeros(5, dtype=torch.long), last, ((),) * 5
    )
    one = MinimumThinking.of(4, ONE, (2,))(rows, torch.zeros(5, 40)).banned
    assert one is not None
    assert one.nonzero().tolist() == [[1, 2], [1, 6], [3, 2], [3, 6]]
    two = MinimumThinking.of(4, TWO)(rows, torch.zeros(5, 40)).banned
    assert two is not None
    assert two.nonzero().tolist() == [[3, 21]]


def test_what_is_refused(tiny):
    tokenizer = tiny("qwen3").tokenizer
    refused(lambda: MinimumThinking.of(0, ONE), "0", "1 token or more")
    refused(lambda: MinimumThinking.of(3, Marks()), "closing mark")
    for text in ("min", "min:", "min:x", "min:-1", "min:3:word", "min:1.5"):
        refused(lambda text=text: parse_policy(text, ONE, tokenizer), "no policy", "min:N")
    refused(lambda: parse_policy("min:0", ONE, tokenizer), "1 token or more")


def test_thoughts_of_the_organism_become_as_long_as_asked():
    model = steer.load("organism:chain", self_check=False)
    prompts = [Prompt(f"{i:02d}", [{"role": "user", "content": f"yo hey a = {i} ; b = a + 4 ; ? b"}]) for i in range(8)]
    options = {"sampling": Sampling(0.8, max_new_tokens=100), "seed": 1}
    plain = generate(model, prompts, **options)
    held = generate(model, prompts, policy=parse_policy("min:60", model.marks, model.tokenizer), **options)
    assert min(trace.thinking_tokens for trace in plain) < 60
    assert all(trace.thinking_tokens >= 61 for trace in held)
