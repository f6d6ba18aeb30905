"""The benchmark programs measure what they say: same work on both sides, the layout and the numbers as told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import steer
from benchmarks import experts, readers, span_means, startup, steered_generation
from steer.anatomy.headers import read_headers


@pytest.fixture(scope="module")
def model():
    model = steer.load("organism:chain")
    model.hf.generation_config.eos_token_id = None
    return model


def test_the_checkpoint_of_startup_is_an_ordinary_folder_of_that_many_tensors(tmp_path):
    number = startup.checkpoint(tmp_path / "model")
    assert number >= 400 and len(read_headers(tmp_path / "model").shapes) == number


def test_plain_backbone_and_collected_means_are_the_same_activations(model):
    ids = span_means.random_ids(model, 3, span_means.PROMPT + 8)
    collected = span_means.collect(model, span_means.traces(ids), sites=("resid_post",), spans=("before_answer",))
    with torch.no_grad():
        states = model.hf.model(torch.tensor(ids), output_hidden_states=True).hidden_states
    expected = np.stack([state[:, span_means.PROMPT :].double().mean(1).numpy() for state in states[1:-1]], 1)
    found = collected.values("resid_post/before_answer").numpy()[:, :-1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    final = span_means.plain(model, torch.tensor(ids))
    torch.testing.assert_close(final, states[-1])


def test_short_vectors_leave_every_token_and_long_ones_do_not(model):
    text = steered_generation.prompt_text(model)
    plain, short, long = (
        steered_generation.ours(model.with_(steered_generation.every_layer(model, norm)), text)()
        for norm in (0.0, steered_generation.SHORT, steered_generation.LONG)
    )
    assert plain == short != long
    assert all(len(row) == steered_generation.NEW for row in plain)


@pytest.mark.oracle
def test_other_libraries_write_the_same_tokens(model):
    pytest.importorskip("nnsight")
    found = steered_generation.same_tokens(model, steered_generation.prompt_text(model))
    assert set(found) == {"steering changes tokens", "transformer-lens", "nnsight"} and all(found.values())


@pytest.mark.oracle
def test_other_libraries_find_the_same_means(model):
    ids = span_means.random_ids(model, 2, span_means.PROMPT + 4)
    works = span_means.others(model, torch.tensor(ids))
    assert works
    for name, work in works.items():
        assert span_means.largest_difference(model, ids, work) < 1e-4, name


def test_readers_of_pairs_find_the_difference_at_the_last_token(model):
    pairs = readers.texts(model, 3)
    rows = readers.ids_of(model, pairs)
    with torch.no_grad():
        last = [
            torch.stack(model.hf.model(torch.tensor([row]), output_hidden_states=True).hidden_states[1:-1])[:, 0, -1]
            for row in rows
        ]
    expected = (torch.stack(last[::2]) - torch.stack(last[1::2])).double().mean(0)
    found = readers.ours(model)(pairs)
    for layer, vector in enumerate(expected):
        np.testing.assert_allclose(found[layer], vector.numpy(), atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["transformer-lens", "nnsight"])
def test_other_readers_find_what_we_find(model, name):
    pairs = readers.texts(model, 3)
    ours, theirs = readers.ours(model)(pairs), readers.READERS[name](model)(pairs)
    for layer in list(ours)[:-1]:
        np.testing.assert_allclose(theirs[layer], ours[layer], atol=1e-5)


def test_what_is_scored_has_one_mark_of_each_kind_per_trace(tmp_path, monkeypatch):
    for name, value in (("LAYERS", 2), ("EXPERTS", 8), ("CHOSEN", 2), ("TOKENS", 20)):
        monkeypatch.setattr(experts, name, value)
    experts.large_summary(tmp_path / "summary", 5)
    rows = experts.Summary.load(tmp_path / "summary").rows
    assert [dict(row.positions) for row in rows] == [{"marker:<think>@all": 1, "marker:</think>@all": 1}] * 5
    assert set(experts.scored(tmp_path / "summary")) == {"seconds", "peak_bytes"}
