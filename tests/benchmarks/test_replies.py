"""The benchmark of replies lets both sides do the same work."""

from __future__ import annotations

import steer
from benchmarks.replies import LONGEST, theirs
from steer.generation import Prompt, Sampling


def test_greedy_both_sides_write_as_many_tokens():
    model = steer.load("organism:chain")
    texts = [
        "hey a = 3 ; b = a + 4 ; ? b",
        "exam a = 3 ; b = a + 4 ; c = b * 2 ; ? c",
        "please a = 5 ; b = a - 2 ; ? b",
    ]
    prompts = [Prompt(str(number), [{"role": "user", "content": text}]) for number, text in enumerate(texts)]
    ours = model.generate(prompts, sampling=Sampling(0.0, max_new_tokens=LONGEST))
    assert theirs(model, prompts, greedy=True) == sum(len(trace.completion_token_ids) for trace in ours)
    assert all(trace.finish_reason == "stop" for trace in ours)
