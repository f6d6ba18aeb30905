"""The penalty on switching thoughts: against its formula written out for one sequence, and by what it does to replies."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import steer
from experiments.think_policies import SwitchPenalty, parse_policy
from experiments.think_policies.switching import switch_tokens
from steer.generation import generate
from steer.marks import Marks
from steer.phases import State
from steer.policy import Decision, check_decision
from steer.prompts import Prompt
from steer.sampling import Sampling
from tests.experiments.think_policies import test_budget as budget
from tests.steer.made import refused
from tests.tiny import WORDS

MARKS = Marks(((5,),), ((6,),))
WAIT, THEN = WORDS.index("wait"), WORDS.index("then")
PROMPTS = [Prompt(f"q{i}", [{"role": "user", "content": " ".join("abcdefghij"[: 1 + i])}]) for i in range(8)]
OPTIONS = {"sampling": Sampling(1.5, max_new_tokens=60), "seed": 2, "samples": 2}


@pytest.fixture(scope="module", params=[MARKS, Marks()], ids=["marks", "no marks"])
def model(request, tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        hf.lm_head.weight[[5, WAIT, THEN]] *= 3.0
        hf.lm_head.weight[[2, 6]] *= 0.3
    return steer.wrap(hf, tokenizer, marks=request.param)


def penalised(tokens, prompt_length, steps, marked):
    """Of a finished sequence, the places whose logits are changed: t < start + steps, written as the paper has it."""
    found, start = [], None if marked else prompt_length
    for place in range(prompt_length, len(tokens)):
        if start is not None and place < start + steps:
            found.append(place - prompt_length)
        if marked and tokens[place] == 5 and start is None:
            start = place
        elif marked and tokens[place] == 6:
            start = None
        elif tokens[place] in (WAIT, THEN) and start is not None:
            start = place
    return found


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_it_acts_where_the_formula_says(model, steps):
    policy = parse_policy(f"tip:2.5:{steps}:wait,then", model.marks, model.tokenizer)
    seen: dict[tuple[str, int], list[int]] = {}

    class Watched:
        name = policy.name

        def __call__(self, rows, logits):
            decision = policy(rows, logits)
            changed = decision.added != 0
            assert set(decision.added.unique().tolist()) <= {0.0, -2.5}
            for row, key in enumerate(zip(rows.items, rows.samples, strict=True)):
                assert changed[row].nonzero()[:, 0].tolist() in ([], sorted((WAIT, THEN)))
                if changed[row].any():
                    seen.setdefault(key, []).append(int(rows.generated[row]))
            return decision

    traces = generate(model, PROMPTS, policy=Watched(), **OPTIONS)
    assert sum(trace.completion_token_ids.count(WAIT) for trace in traces) > 3
    for trace in traces:
        expected = penalised(trace.tokens, trace.prompt_length, steps, model.marks.exist)
        told = [place for place in seen.get((trace.item, trace.sample), []) if place < len(trace.completion_token_ids)]
        assert told == expected


def test_switches_become_rare(model):
    plain = generate(model, PROMPTS, **OPTIONS)
    held = generate(model, PROMPTS, policy=parse_policy("tip:30:600:wait,then", model.marks, model.tokenizer), **OPTIONS)  # fmt: skip

    def switches(traces):
        inside = [trace.thinking_span if model.marks.exist else (trace.prompt_length, len(trace.tokens)) for trace in traces]  # fmt: skip
        return sum(token in (WAIT, THEN) for trace, span in zip(traces, inside, strict=True) if span for token in trace.tokens[slice(*span)])  # fmt: skip

    assert switches(plain) > 10 and switches(held) == 0
    assert held.meta["policy"] == "tip:30:600:wait,then"


def test_numbers_that_a_policy_adds_are_added_to_the_logits(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    added = torch.linspace(-3, 3, len(WORDS), dtype=torch.float64)

    class Adding:
        name = "adding"

        def __call__(self, rows, logits):
            return Decision(added=added.expand_as(logits))

    told = generate(model, PROMPTS, policy=Adding(), **OPTIONS)
    hf.lm_head.bias = torch.nn.Parameter(added)
    assert [trace.completion_token_ids for trace in generate(model, PROMPTS, **OPTIONS)] == [
        trace.completion_token_ids for trace in told
    ]
    for wrong, word in ((torch.zeros(1, 5), "shape"), (torch.full((2, 5), -torch.inf), "not finite")):
        with pytest.raises(ValueError, match=word):
            check_decision(Decision(added=wrong), 2, 5)


def test_words_are_found_in_every_spelling():
    words = ["alternatively", "Alternatively", "▁alternatively", "ĠAlternatively", "alternative", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert switch_tokens(" alternatively", tokenizer) == (0, 1, 2, 3)
    policy = SwitchPenalty.of(MARKS, tokenizer)
    assert policy.switches == (0, 1, 2, 3) and policy.name == "tip:3:600"
    assert parse_policy(policy.name, MARKS, tokenizer) == policy


def test_names_can_be_read_again(tiny):
    tokenizer = tiny("qwen3").tokenizer
    for text in ("tip:3:600:wait", "tip:0.123456789:1:wait,then"):
        assert parse_policy(text, MARKS, tokenizer).name == text


def test_what_is_refused(tiny):
    tokenizer = tiny("qwen3").tokenizer
    refused(lambda: parse_policy("tip:3:600", MARKS, tokenizer), "alternatively", "one token", "min:N")
    refused(lambda: parse_policy("tip:3:600:", MARKS, tokenizer), "one token")
    refused(lambda: parse_policy("tip:0:600:wait", MARKS, tokenizer), "above 0", "tip:3:600")
    refused(lambda: parse_policy("tip:nan:600:wait", MARKS, tokenizer), "above 0")
    refused(lambda: parse_policy("tip:3:0:wait", MARKS, tokenizer), "1 token or more")
    refused(lambda: SwitchPenalty(3.0, 5, ()), "at least one")
    for text in ("tip", "tip:3", "tip:x:5:wait", "tip:3:x:wait", "tip:3:1.5"):
        refused(lambda text=text: parse_policy(text, MARKS, tokenizer), "no policy", "tip:ALPHA:STEPS")


def test_outside_a_thought_nothing_is_added():
    policy = SwitchPenalty(3.0, 5, (7,))
    rows = [State.OPENING, State.ANSWER]
    decision = policy(budget.rows(rows, [0, 0], [0, 0]), torch.zeros(2, 10))
    assert not decision.added.any()
