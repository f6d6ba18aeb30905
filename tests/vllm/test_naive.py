"""The reference of this lane and the hook form of this project say the same; without vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import steer
from steer.backends.vllm.request import effective
from tests.vllm import cases
from tests.vllm.lab import SAME, Bench, farthest


@pytest.mark.parametrize("name", ["chain", "chain-moe", "qwen2"])
def test_the_hook_form_says_what_the_reference_says(bench: Callable[[str], Bench], name: str) -> None:
    made = bench(name)
    model = steer.load(str(made.model))
    for ask in cases.batch(made):
        expected = made.expected(ask)
        view = model
        if ask.steering is not None:
            acting = effective(made.steerings[ask.steering], ask.coefficient, ask.phase)
            assert acting is not None
            view = model.with_(acting)
        whole = [*ask.prompt, *expected.tokens]
        (logits,) = view.run([whole], [len(ask.prompt)], [int(ask.start)])
        found = torch.log_softmax(logits[len(ask.prompt) - 1 : -1], -1)
        assert found.argmax(-1).tolist() == expected.tokens
        assert farthest(found.max(-1).values.tolist(), expected.logprobs) <= SAME
