"""Differently steered requests in one batch say what plain hooks say, in every way that vLLM runs a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.vllm import cases
from tests.vllm.lab import SAME, Ask, Bench, Result, farthest

pytestmark = pytest.mark.vllm
Benches = Callable[[str], Bench]
COMPILED = {"enforce_eager": False}
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def alike(bench: Bench, asks: Sequence[Ask], *more: Sequence[Ask], **options: Any) -> Result:
    """Run the batch unsteered, then steered; compare both with the reference, and unsteered rows with each other.

    `more` are further rounds of the same engine, for others to judge.
    """
    plain = [ask.plain for ask in asks]
    result = bench.engine(plain, asks, *more, **options)
    bench.check_steered(asks)
    bench.check(plain, result.rounds[0])
    bench.check(asks, result.rounds[1])
    for ask, idle, beside in zip(asks, *result.rounds[:2], strict=True):
        if ask.steering is None:
            assert idle == beside, "an unsteered request changed a bit when others beside it were steered"
    return result


def test_eager_organism(bench: Benches) -> None:
    made = bench("chain")
    _, asks, *more = cases.rounds(made).values()
    alike(made, asks, *more)


def test_the_idle_plugin_is_not_there(bench: Benches) -> None:
    made = bench("chain")
    asked = cases.rounds(made)
    (without,) = made.engine(asked["plain"], plugin=False).rounds
    idle, *_ = made.engine(*asked.values()).rounds
    assert [answer.tokens for answer in without] == [answer.tokens for answer in idle]
    assert max(farthest(a.logprobs, b.logprobs) for a, b in zip(without, idle, strict=True)) <= SAME


def test_what_cannot_be_steered_is_refused_alone(bench: Benches) -> None:
    made = bench("chain")
    asked = cases.rounds(made)
    first, nobody, elsewhere, narrow, behind, last = made.engine(*asked.values()).rounds[-1]
    made.check([asked["refused"][0], asked["refused"][-1]], [first, last])
    assert "has no steering" in str(nobody.error)
    assert "mlp_out of layers 1" in str(elsewhere.error)
    assert "64" in str(narrow.error) and "128" in str(narrow.error)
    assert "steering_prompt" in str(behind.error)


def test_compiled(bench: Benches) -> None:
    alike(bench("chain"), cases.batch(bench("chain")), **COMPILED)


def test_prompts_in_chunks_of_sixteen_tokens(bench: Benches) -> None:
    """A mixture of experts, eager."""
    made = bench("chain-moe")
    alike(made, cases.batch(made), max_num_batched_tokens=16)


def test_two_tensor_parallel_processes(bench: Benches) -> None:
    made = bench("chain-moe")
    alike(made, cases.batch(made), environment=PROCESSES, tensor_parallel_size=2)


def test_two_pipeline_stages(bench: Benches) -> None:
    """Compiled: without a compiler vLLM's own pipeline does not run on processors."""
    made = bench("chain")
    alike(made, cases.batch(made), environment=PROCESSES, pipeline_parallel_size=2, **COMPILED)


def test_drafts_from_the_prompt(bench: Benches) -> None:
    made = bench("chain")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    result = alike(made, cases.batch(made, marked=False), speculative_config=drafts)
    assert result.counters["vllm:spec_decode_num_accepted_tokens"] > 0


def test_the_second_runner(bench: Benches) -> None:
    made = bench("chain-moe")
    result = alike(made, cases.batch(made), interpreted=True)
    assert "Using V2 Model Runner" in result.said


def test_preempted_requests(bench: Benches) -> None:
    """Ten blocks of 32 tokens hold fewer than eight replies, so some are thrown out and read again. Eager, too."""
    made = bench("qwen2")
    asks = [replace(ask, tokens=40) for ask in cases.batch(made)]
    result = alike(made, asks, num_gpu_blocks_override=10)
    assert result.counters["vllm:num_preemptions"] > 0
