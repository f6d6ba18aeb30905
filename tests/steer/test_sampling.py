"""The sampler against naive distributions, and the streams' independence."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from steer import sampling as module
from steer.sampling import Sampling, choose, end_tokens, uniforms
from tests.steer.made import SEEDS, refused

GRID = 2000


def naive(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, one token after another."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[: top_k or len(order)]
    weights = {token: np.exp(scaled[token] - scaled.max()) for token in kept}
    total, reached, nucleus = sum(weights.values()), 0.0, {}
    for token in kept:
        if reached < top_p * total or not nucleus:
            nucleus[token] = weights[token]
        reached += weights[token]
    whole = sum(nucleus.values())
    return np.array([nucleus.get(token, 0.0) / whole for token in range(len(scaled))])


def measured(logits: np.ndarray, options: Sampling) -> np.ndarray:
    """Shares of the unit interval that lead to each token."""
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = choose(torch.tensor(logits, dtype=torch.float32).expand(GRID, -1), grid, options)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / GRID


@given(
    SEEDS,
    st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    st.sampled_from([0, 1, 3, 7, 50]),
    st.sampled_from([0.2, 0.7, 0.95, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_distribution_is_the_naive_one(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, 12).astype(np.float32)
    found = measured(logits, Sampling(temperature, top_p, top_k))
    expected = naive(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(found, expected, atol=1.01 / GRID)
    assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("spread", [0.01, 4.0])  # Flat: 1024 tokens do not reach top-p; peaked: they do.
def test_a_large_vocabulary_gives_the_same_with_and_without_a_full_sort(spread, monkeypatch):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * spread
    numbers = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    partly = choose(logits, numbers, Sampling(1.0, 0.9))
    monkeypatch.setattr(module, "_HEAD", 10**9)
    assert torch.equal(partly, choose(logits, numbers, Sampling(1.0, 0.9)))


def test_greedy_and_the_ends_of_the_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    zero, nearly_one = torch.zeros(1, dtype=torch.float64), torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, zero, Sampling(0.0)).tolist() == [2]
    assert choose(logits, zero, Sampling(1.0)).tolist() == [1]  # Never the excluded token before it,
    assert choose(logits, nearly_one, Sampling(1.0)).tolist() == [2]  # nor the one behind.
    assert choose(logits, nearly_one, Sampling(1.0, 0.9)).tolist() == [1]
    assert choose(logits, nearly_one, Sampling(1.0, 0.5)).tolist() == [2]


def test_a_tiny_temperature_is_greedy_without_overflow():
    logits = torch.tensor([[900.0, 901.0, -900.0]])
    assert choose(logits, torch.tensor([0.999], dtype=torch.float64), Sampling(1e-4)).tolist() == [1]


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(3)
    logits, numbers = torch.randn(8, 40, generator=generator), torch.rand(8, dtype=torch.float64, generator=generator)
    for options in (Sampling(0.7), Sampling(0.7, 0.9), Sampling(0.7, 0.9, 5), Sampling(0.0)):
        together = choose(logits, numbers, options)
        alone = torch.cat([choose(logits[row : row + 1], numbers[row : row + 1], options) for row in range(8)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    refused(
        lambda: choose(logits, torch.zeros(2, dtype=torch.float64), Sampling(temperature)),
        "not numbers",
        "smaller coefficient",
    )
    nothing = torch.full((1, 2), -torch.inf)
    refused(lambda: choose(nothing, torch.zeros(1, dtype=torch.float64), Sampling(temperature)), "not numbers")


def test_streams_are_a_function_of_their_key():
    first = uniforms(1, "q", 0, 50)
    assert (first == uniforms(1, "q", 0, 50)).all() and (first[:20] == uniforms(1, "q", 0, 20)).all()
    others = [uniforms(2, "q", 0, 50), uniforms(1, "r", 0, 50), uniforms(1, "q", 1, 50), uniforms(1, "q0", 0, 50)]
    assert all((first != other).all() for other in others)


def test_streams_are_uniform_within_and_across():
    long = uniforms(0, "q", 0, 20000)
    across = np.array([uniforms(0, "q", sample, 1)[0] for sample in range(5000)])
    for numbers in (long, across):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = np.histogram(numbers, 20, (0, 1))[0]
        expected = len(numbers) / 20
        assert ((counts - expected) ** 2 / expected).sum() < 45  # 99.9 % of a chi-square with 19 degrees.
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.03


def test_the_streams_first_numbers_are_pinned():
    """Philox and the hash are fixed by their definitions, so a run made today can be resumed under another numpy."""
    key = int.from_bytes(__import__("hashlib").blake2b(b'[7,"item",2]', digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(3)
    assert [float(x) for x in uniforms(7, "item", 2, 3)] == [(int(x) >> 11) / 2**53 for x in raw]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
)
def test_options_out_of_range(options):
    refused(lambda: Sampling(**options), next(iter(options)))


def model(card=None, **told):
    return SimpleNamespace(
        card=card,
        hf=SimpleNamespace(generation_config=GenerationConfig(**told)),
        tokenizer=SimpleNamespace(eos_token_id=9),
    )


def test_what_a_model_asks_for():
    assert Sampling.of(model()) == Sampling(0.0)
    assert Sampling.of(model(do_sample=False, temperature=0.3)) == Sampling(0.0)
    asked = model(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=77)
    assert Sampling.of(asked) == Sampling(0.6, 0.95, 20, 77)
    assert Sampling.of(model(do_sample=True)).temperature == 1.0
    assert Sampling.of(model({"temperature": 0.8, "max_new_tokens": 200}, do_sample=False)) == Sampling(
        0.8, 1.0, 0, 200
    )
    assert Sampling(0.5).to_dict() == {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "max_new_tokens": 512}


def test_what_ends_a_reply():
    assert end_tokens(model(eos_token_id=3)) == {3}
    assert end_tokens(model(eos_token_id=[3, 4])) == {3, 4}
    assert end_tokens(model()) == {9}
    silent = model()
    silent.tokenizer.eos_token_id = None
    assert end_tokens(silent) == frozenset()
