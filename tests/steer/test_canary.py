"""The canary sings on every family it is meant for, and is silent when steering is broken in any of the ways it names."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import steer
from steer.canary import TOKENS, Canary, sing
from steer.hooks import Taps

GOOD = Canary(change=3.0, error=1e-6, positions=TOKENS, zero_is_plain=True, left_behind=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "qwen3_moe"])
def test_it_sings_where_embeddings_enter_the_stream_as_they_are(family, tiny):
    canary = sing(steer.wrap(*tiny(family)))
    assert canary.passed, canary
    assert canary.change > 0.1


def test_it_is_a_function_of_its_seed(tiny):
    model = steer.wrap(*tiny("llama"))
    assert sing(model, 1) == sing(model, 1) != sing(model, 2)


@pytest.mark.parametrize(
    "flaw",
    [
        {"change": 0.0},
        {"error": 0.01},
        {"error": float("nan")},
        {"positions": 0},
        {"zero_is_plain": False},
        {"left_behind": 1},
    ],
)
def test_each_flaw_alone_fails(flaw):
    assert GOOD.passed
    assert not replace(GOOD, **flaw).passed


def test_hooks_that_do_nothing_are_noticed(tiny, monkeypatch):
    model = steer.wrap(*tiny("llama"))

    @contextmanager
    def idle(self, steering, coefficient=1.0):
        class Nothing:
            positions = TOKENS

        yield Nothing()

    monkeypatch.setattr(Taps, "write", idle)
    assert not sing(model).passed


def test_hooks_that_do_half_are_noticed(tiny, monkeypatch):
    model = steer.wrap(*tiny("llama"))
    write = Taps.write
    monkeypatch.setattr(
        Taps, "write", lambda self, steering, coefficient=1.0: write(self, steering, coefficient * 0.99)
    )
    canary = sing(model)
    assert not canary.passed and canary.error > 1e-4


def test_a_hook_left_behind_is_noticed(tiny, monkeypatch):
    model = steer.wrap(*tiny("llama"))
    write = Taps.write

    def leave(self, steering, coefficient=1.0):
        model.hf.register_forward_hook(lambda *arguments: None)
        return write(self, steering, coefficient)

    monkeypatch.setattr(Taps, "write", leave)
    assert sing(model).left_behind == 2


def test_it_runs_in_bf16_with_the_tolerance_saying_so(tiny):
    canary = sing(steer.wrap(*tiny("llama", dtype=torch.bfloat16)))
    assert canary.zero_is_plain and canary.positions == TOKENS and canary.change > 0.1
