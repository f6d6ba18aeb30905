"""What a think policy sees and may do, on a tiny model; decisions of the wrong shape are refused."""

from __future__ import annotations

import pytest
import torch

import steer
from steer.generation import generate
from steer.phases import State, find_events, states_of
from steer.policy import Decision, check_decision
from steer.prompts import Prompt
from steer.sampling import Sampling
from tests.steer.made import refused

OPTIONS = {"sampling": Sampling(1.5, max_new_tokens=20), "seed": 2}
PROMPTS = [Prompt(f"q{i}", [{"role": "user", "content": " ".join("abcdefghij"[: 1 + i])}]) for i in range(8)]
OPEN, CLOSE, EOS = 5, 6, 2


@pytest.fixture(scope="module")
def model(tiny):
    """A random model that likes its marks, so that thoughts open and close."""
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        hf.lm_head.weight[[OPEN, CLOSE]] *= 2.5
    return steer.wrap(hf, tokenizer)


class Policy:
    name = "trial"

    def __init__(self, decide):
        self.decide = decide

    def __call__(self, rows, logits):
        return self.decide(rows, logits)


def test_what_a_policy_sees_is_what_the_trace_says_later(model):
    seen = []

    def decide(rows, logits):
        for row in range(len(rows.items)):
            values = (rows.states, rows.generated, rows.thinking, rows.forced_run)
            state, generated, thinking, run = (int(value[row]) for value in values)
            seen.append(
                (rows.items[row], rows.samples[row], generated, state, thinking, run, rows.last_tokens[row].tolist())
            )
        return Decision()

    traces = {
        trace.id: trace for trace in generate(model, PROMPTS, samples=2, policy=Policy(decide), batch_size=5, **OPTIONS)
    }
    assert any(trace.thinking_span for trace in traces.values()) and any(trace.closed for trace in traces.values())
    for item, sample, generated, state, thinking, run, last in seen:
        trace = traces[f"{item}/{sample}"]
        if generated >= len(trace.completion_token_ids):
            continue  # A row that has ended and waits to leave the batch.
        read = trace.tokens[: trace.prompt_length + generated]
        expected = states_of(read, trace.prompt_length, model.marks, trace.generation_prompt_start)[-1]
        assert state == expected and run == 0
        assert [token for token in last if token >= 0] == list(read[-32:]) and last[-len(read[-32:]) :] == list(
            read[-32:]
        )
        start = None
        for event in find_events(read, model.marks, trace.generation_prompt_start):
            start = (event.start if start is None else start) if event.opens else None
        assert thinking == (0 if expected != State.THINKING else len(read) - start)


def test_a_policy_that_wants_nothing_changes_nothing(model):
    plain = list(generate(model, PROMPTS, **OPTIONS))
    assert list(generate(model, PROMPTS, policy=Policy(lambda rows, logits: Decision()), **OPTIONS)) == plain
    nothing = Policy(
        lambda rows, logits: Decision(
            torch.full_like(rows.states, -1), torch.zeros_like(logits, dtype=torch.bool), rows.states < -1
        )
    )
    assert list(generate(model, PROMPTS, policy=nothing, **OPTIONS)) == plain


def test_forced_tokens_are_written_and_noted_and_others_stay(model):
    def decide(rows, logits):
        force = (rows.generated == 3) & torch.tensor([item in ("q1", "q4") for item in rows.items])
        return Decision(forced=torch.where(force, 17, -1))

    plain = generate(model, PROMPTS, **OPTIONS)
    for before, after in zip(plain, generate(model, PROMPTS, policy=Policy(decide), **OPTIONS), strict=True):
        if after.item in ("q1", "q4") and len(before.completion_token_ids) > 3:
            assert after.completion_token_ids[:4] == (*before.completion_token_ids[:3], 17) and after.forced == (3,)
        else:
            assert after == before and after.forced == ()


def test_a_forced_end_token_ends_the_reply(model):
    policy = Policy(lambda rows, logits: Decision(forced=torch.where(rows.generated == 2, EOS, -1)))
    for trace in generate(model, PROMPTS, policy=policy, **OPTIONS):
        assert trace.finish_reason == "stop" and len(trace.completion_token_ids) <= 3
        assert trace.forced == ((2,) if len(trace.completion_token_ids) == 3 else ())


def test_banned_tokens_never_appear_and_the_rest_keep_their_odds(model):
    def decide(rows, logits):
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[:, [OPEN, CLOSE, EOS]] = True
        return Decision(banned=banned)

    traces = generate(model, PROMPTS, samples=3, policy=Policy(decide), **OPTIONS)
    assert not {OPEN, CLOSE, EOS} & {token for trace in traces for token in trace.completion_token_ids}
    assert all(trace.finish_reason == "length" and trace.forced == () for trace in traces)


def test_stopping(model):
    plain = generate(model, PROMPTS, **OPTIONS)
    stopped = generate(
        model, PROMPTS, policy=Policy(lambda rows, logits: Decision(stop=rows.generated >= 4)), **OPTIONS
    )
    for before, after in zip(plain, stopped, strict=True):
        assert after.completion_token_ids == before.completion_token_ids[:4]
        assert after.finish_reason == ("policy" if len(before.completion_token_ids) > 4 else before.finish_reason)
    at_once = generate(
        model,
        PROMPTS,
        policy=Policy(lambda rows, logits: Decision(stop=torch.ones_like(rows.states).bool())),
        **OPTIONS,
    )
    assert all(
        trace.completion_token_ids == () and trace.finish_reason == "policy" and trace.text == "" for trace in at_once
    )


def test_a_run_of_forced_tokens_is_counted(model):
    runs = []

    def decide(rows, logits):
        runs.extend(zip(rows.items, rows.generated.tolist(), rows.forced_run.tolist(), strict=True))
        return Decision(forced=torch.where((rows.generated >= 2) & (rows.generated < 5), 20, -1))

    generate(model, PROMPTS[:1], policy=Policy(decide), sampling=Sampling(0.0, max_new_tokens=8))
    assert [run for _, _, run in runs][:8] == [0, 0, 0, 1, 2, 3, 0, 0][: len(runs)]


@pytest.mark.parametrize(
    ("decision", "word"),
    [
        (Decision(forced=torch.zeros(3, dtype=torch.long)), "forced has shape"),
        (Decision(forced=torch.tensor([0, 10])), "outside the vocabulary"),
        (Decision(forced=torch.tensor([0, -2])), "outside the vocabulary"),
        (Decision(banned=torch.zeros(1, 10, dtype=torch.bool)), "banned has shape"),
        (Decision(banned=torch.ones(2, 10, dtype=torch.bool)), "bans every token"),
        (Decision(stop=torch.zeros(1, dtype=torch.bool)), "stop has shape"),
    ],
)
def test_decisions_that_do_not_fit(decision, word):
    with pytest.raises(ValueError, match=word):
        check_decision(decision, 2, 10)


def test_a_policy_that_needs_marks(tiny):
    hf, tokenizer = tiny("qwen3")
    policy = Policy(lambda rows, logits: Decision())
    policy.needs_marks = True
    unmarked = steer.wrap(hf, tokenizer, marks=steer.marks.Marks())
    refused(lambda: generate(unmarked, ["a"], policy=policy), "trial", "no marks")
