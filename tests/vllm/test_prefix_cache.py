"""A prefix cache under steering, in an engine of several processes: shared where nothing was steered, never elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.vllm import cases
from tests.vllm.lab import Ask, Bench

pytestmark = pytest.mark.vllm
BLOCK = 32


def test_a_differently_steered_twin_is_not_read(bench: Callable[[str], Bench]) -> None:
    made = bench("chain")
    prompt = tuple(token for ids, _ in cases.prompts(made) for token in ids)[:110]
    plain = Ask(prompt)
    add, twice = replace(plain, steering="add"), replace(plain, steering="add", coefficient=2.0)
    reply, asked = replace(add, phase="generated"), replace(add, phase="prompt")
    other = replace(plain, steering="other", phase="generated")
    whole = 3 * BLOCK
    rounds = {
        # Who asks, and how many tokens of the prompt come from the cache.
        plain: 0,
        add: 0,
        twice: 0,
        reply: whole,  # Nothing acts before the last token of the prompt.
        asked: 0,
        other: whole,
    }
    again = [plain, add, twice, reply, asked, other]
    result = made.engine(
        *[[ask] for ask in rounds],
        again,
        enable_prefix_caching=True,
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    made.check_steered(again)
    for (ask, cached), (answer,) in zip(rounds.items(), result.rounds, strict=False):
        made.check([ask], [answer])
        assert answer.cached == cached, ask
    made.check(again, result.rounds[-1])
    assert [answer.cached for answer in result.rounds[-1]] == [whole] * len(again)
