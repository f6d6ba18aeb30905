"""Phases while generating: steered batches agree with whole sequences steered in one pass, and counts with an oracle."""

from __future__ import annotations

import pytest
import torch

import steer
from steer.directions import Direction
from steer.generation import generate
from steer.interventions import Add
from steer.marks import Marks
from steer.phases import PHASES, State, states_of
from steer.prompts import Prompt
from steer.sampling import Sampling
from steer.steering import Steering
from tests.steer.test_generation import Listener

OPTIONS = {"sampling": Sampling(1.5, max_new_tokens=16), "seed": 2, "batch_size": 3}
CHATS = [Prompt(f"q{i}", [{"role": "user", "content": " ".join("abcdefghij"[: 1 + i])}]) for i in range(4)]
RAW = [Prompt("raw0", "a <think> b"), Prompt("raw1", "a <think> b </think> c"), Prompt("raw2", "a b c d e f")]
OF_PHASE = {
    "all": set(State) - {State.PADDING},
    "prompt": {State.PROMPT},
    "opening": {State.OPENING},
    "generated": {State.OPENING, State.THINKING, State.ANSWER},
    "thinking": {State.THINKING},
    "answer": {State.ANSWER},
}


@pytest.fixture(scope="module", params=["one", "two"])
def model(request, tiny):
    """Random models that like their marks; the second's closing mark has two tokens."""
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    marks = Marks(((5,),), ((6,),)) if request.param == "one" else Marks(((5,),), ((6, 20), (21,)))
    with torch.no_grad():
        hf.lm_head.weight[[5, 6, 21]] *= 2.5
    return steer.wrap(hf, tokenizer, marks=marks)


def steering(model, phase: str) -> Steering:
    vectors = torch.randn(2, model.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    direction = Direction(vectors, (1, 2), "resid_post", model.identity)
    return Steering((Add(direction, "resid_post", 0.7, phase=phase),), model.identity)


@pytest.mark.filterwarnings("ignore:The steering touched 0 positions")
@pytest.mark.parametrize("phase", PHASES)
def test_steered_batches_agree_with_one_pass_over_the_whole_sequence(model, phase):
    listener = Listener()
    with model.steered(steering(model, phase)) as report:
        traces = generate(model, [*CHATS, *RAW], policy=listener, **OPTIONS)
    states = {
        trace.id: states_of(trace.tokens[:-1], trace.prompt_length, model.marks, trace.generation_prompt_start)
        for trace in traces
    }
    expected = sum(state in OF_PHASE[phase] for several in states.values() for state in several)
    assert expected > 0 and report.touched == {(layer, "resid_post"): {phase: expected} for layer in (1, 2)}
    for trace in traces:
        with model.steered(steering(model, phase)):
            whole = model.run([trace.tokens[:-1]], [trace.prompt_length], [trace.generation_prompt_start])[0]
        plain = model.run([trace.tokens[:-1]])[0]
        seen = torch.stack([listener.seen[trace.item, 0, step] for step in range(len(trace.completion_token_ids))])
        assert (seen - whole[trace.prompt_length - 1 :]).abs().max() < 1e-9 * whole.abs().max()
        steered = any(state in OF_PHASE[phase] for state in states[trace.id])
        assert torch.equal(whole, plain) != steered  # The comparison would notice a steering that did nothing.


def test_traces_and_a_running_batch_agree_on_every_state(model):
    """What the hooks were told, token by token, is what `states_of` says of the finished trace."""
    seen = []
    with model.read(lambda site, layer, value, states: seen.append(states.clone()), {"resid_post": [0]}):
        traces = generate(model, CHATS[:1], sampling=Sampling(1.5, max_new_tokens=20), seed=7)
    whole = torch.cat(seen, 1)[0].tolist()
    trace = traces[0]
    assert whole == states_of(trace.tokens[:-1], trace.prompt_length, model.marks, trace.generation_prompt_start)


def test_a_view_is_entered_by_itself(model):
    change = steering(model, "generated")
    with model.steered(change):
        inside = generate(model, CHATS, **OPTIONS)
    view = model.with_(change)
    assert list(view.generate(CHATS, **OPTIONS)) == list(inside) != list(generate(model, CHATS, **OPTIONS))
    assert view.generate(CHATS, **OPTIONS).meta["changes"] == list(view.change_ids) != []


def test_coefficient_zero_gives_the_same_bytes(model):
    with model.steered(steering(model, "all"), 0.0):
        zero = generate(model, CHATS, **OPTIONS)
    assert zero.lines() == generate(model, CHATS, **OPTIONS).lines()
