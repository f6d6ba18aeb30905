"""The rows in flight: prefill, steps, rows that leave and enter, checked against single rows at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import steer
from steer.decoding import Batch, Reply
from steer.phases import State
from steer.prompts import Prompt, render
from steer.sampling import uniforms
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def model(tiny):
    return steer.wrap(*tiny("gemma2", dtype=torch.float64))


def reply(model, item: str, text: str, sample: int = 0) -> Reply:
    return Reply(Prompt(item, text), render(model.tokenizer, text), sample, 50, uniforms(0, item, sample, 50))


def whole(model, row: Reply) -> torch.Tensor:
    """The next token's logits by one forward over everything, without a cache."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([[*row.rendered.token_ids, *row.tokens]]), use_cache=False).logits[0, -1]


def check(model, batch: Batch) -> None:
    for row, each in enumerate(batch.replies):
        if each.finish is None:
            torch.testing.assert_close(batch.logits[row], whole(model, each), rtol=0, atol=1e-9)


@torch.no_grad()
def step(batch: Batch, generator: torch.Generator) -> None:
    tokens = torch.randint(7, len(WORDS), (len(batch),), generator=generator)
    for each, token in zip(batch.replies, tokens.tolist(), strict=True):
        if each.finish is None:
            each.tokens.append(token)
    batch.step(tokens)


@torch.no_grad()
def test_rows_come_and_go_and_every_row_stays_what_it_is_alone(model):
    generator = torch.Generator().manual_seed(0)
    batch = Batch(model, [reply(model, "a", "a b c d e f g h"), reply(model, "b", "a"), reply(model, "c", "b c d")])
    check(model, batch)
    for _ in range(3):
        step(batch, generator)
        check(model, batch)
    batch.replies[0].finish = "stop"  # The longest prompt: its columns go with it.
    step(batch, generator)
    check(model, batch)
    before = batch.mask.shape[1]
    batch.drop_finished()
    assert len(batch) == 2 and batch.mask.shape[1] == before - 5 == batch.cache.get_seq_length()
    check(model, batch)
    longer, shorter = reply(model, "d", " ".join(WORDS[11:51])), reply(model, "e", "j")
    batch.join(Batch(model, [longer]))  # Longer than the batch is wide,
    check(model, batch)
    batch.join(Batch(model, [shorter]))  # and shorter.
    for _ in range(12):
        step(batch, generator)
        check(model, batch)
    assert [each.prompt.id for each in batch.replies] == ["b", "c", "d", "e"]
    assert batch.positions.state.count.tolist() == [len(r.rendered.token_ids) + len(r.tokens) for r in batch.replies]


@torch.no_grad()
def test_samples_of_a_prompt_share_its_prefill(model):
    rows = [reply(model, item, text, sample) for item, text in (("a", "a b c"), ("b", "d")) for sample in range(3)]
    batch = Batch(model, rows)
    assert len(batch) == 6 and batch.logits.shape[0] == batch.mask.shape[0] == len(batch.positions) == 6
    check(model, batch)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(batch, generator)
    check(model, batch)
    assert len({tuple(each.tokens) for each in rows}) == 6


@torch.no_grad()
def test_a_row_that_ended_counts_as_padding(model):
    batch = Batch(model, [reply(model, "a", "a b"), reply(model, "b", "c d")])
    batch.replies[1].finish = "length"
    batch.step(torch.tensor([11, 12]))
    assert batch.positions.states.tolist() == [[State.OPENING], [State.PADDING]]
    assert batch.mask[:, -1].tolist() == [True, False] and batch.positions.state.count.tolist() == [3, 2]


@torch.no_grad()
def test_each_row_takes_its_own_next_number(model):
    rows = [reply(model, "a", "a"), reply(model, "b", "b")]
    batch = Batch(model, rows)
    rows[0].tokens += [11, 12]
    assert batch.uniform().tolist() == [rows[0].uniforms[2], rows[1].uniforms[0]]
    rows[1].uniforms = np.zeros(0)
    assert batch.uniform()[1] == 0.0


@pytest.mark.parametrize(
    ("written", "forced", "run"),
    [(0, [], 0), (3, [], 0), (3, [2], 1), (3, [1], 0), (4, [1, 2, 3], 3), (5, [0, 1, 3, 4], 2)],
)
def test_forced_tokens_at_the_end(model, written, forced, run):
    row = reply(model, "a", "a")
    row.tokens, row.forced = [11] * written, forced
    assert row.forced_run == run
