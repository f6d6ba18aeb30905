"""Routed experts kept while replies are written, against a full pass over each finished trace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import steer
from probes.experts import expert_scores, from_routed
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.sampling import Sampling
from tests.tiny import Tiny

Make = Callable[[str], SteerableModel]
QUESTIONS = ["why 1 + 2", "hello", "let me think of 3 * 4 ; then 5", "is the answer 7 ?", "so", "wait 9 - 8"]


@pytest.fixture
def mixture(tiny: Callable[..., Tiny]) -> Callable[[str], SteerableModel]:
    return lambda family: steer.wrap(*tiny(family))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_they_are_those_of_a_full_pass(mixture: Make, family: str) -> None:
    """Replies of unequal length in few slots: rows leave, enter and share prompts."""
    model = mixture(family)
    with model.routed() as routes:
        traces = model.generate(QUESTIONS, samples=2, seed=3, batch_size=4, sampling=Sampling(temperature=1.0, max_new_tokens=90))  # fmt: skip
    assert len({len(trace.tokens) for trace in traces}) > 3
    for trace in traces:
        with model.capture({"router": None}) as seen, torch.no_grad():
            model.run([trace.tokens[:-1]])
        expected = np.stack([seen["router"][layer].ids[0].numpy() for layer in routes.layers], axis=1)  # type: ignore[attr-defined]
        found = routes[trace]
        assert found.shape == expected.shape == (len(trace.tokens) - 1, len(routes.layers), 2)
        assert (np.sort(found, axis=2) == np.sort(expected, axis=2)).all()


def test_scores_come_from_them_without_a_second_pass(mixture: Make) -> None:
    model = mixture("qwen3_moe")
    with model.routed() as routes:
        traces = model.generate([f"<think> {text}" for text in QUESTIONS], sampling=Sampling(max_new_tokens=20))
    summary = from_routed(
        traces,
        [routes[trace] for trace in traces],
        routes.layers,
        experts=model.anatomy.experts,
        tokenizer=model.tokenizer,
        model=model.identity,
        markers={"<think>": 1.0},
    )
    scores = expert_scores(summary, {"<think>": 1.0}, resamples=0)
    assert scores.tokens == sum(len(trace.tokens) - 1 for trace in traces)


def test_only_what_was_heard_is_told(mixture: Make) -> None:
    with pytest.raises(SteerError, match="has no experts"), mixture("qwen3").routed():
        pass
    model, options = mixture("olmoe"), Sampling(max_new_tokens=3)
    before = model.generate(QUESTIONS[:1], sampling=options)
    with model.routed() as routes:
        assert len(routes.layers) == 4
    with pytest.raises(SteerError, match="was not written inside"):
        routes[before[0]]
    with model.routed() as routes:
        model.generate(QUESTIONS[:1], sampling=options)
        with pytest.raises(SteerError, match="was written before"):
            model.generate(QUESTIONS[:1], sampling=options)
    later = model.generate(QUESTIONS[1:2], sampling=options)
    with pytest.raises(SteerError, match="were read under its name"):
        routes[later[0]]
    assert model.routes == () and not model.taps._contexts


def test_a_reply_that_was_interrupted_is_not_told_in_part(mixture: Make) -> None:
    model, written = mixture("olmoe"), []

    def interrupt(prompt: object, sample: int, token: int) -> None:
        written.append(token)
        if len(written) == 3:
            raise KeyboardInterrupt

    options = Sampling(temperature=0.0, max_new_tokens=20)
    with model.routed() as routes, pytest.raises(KeyboardInterrupt):
        model.generate(QUESTIONS[:1], sampling=options, on_token=interrupt)
    assert model.routes == () and not model.taps._contexts and not model.taps._positions and not model.taps._handles
    (whole,) = model.generate(QUESTIONS[:1], sampling=options)
    with pytest.raises(SteerError, match="interrupted has to be written again"):
        routes[whole]
