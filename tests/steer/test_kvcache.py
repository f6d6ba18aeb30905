"""The cache: what goes in comes out, rows are selected and joined, buffers do not show."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.kvcache import GrowingLayer, RowCache
from tests.steer.made import SEEDS


def states(generator, rows, columns):
    return torch.randn(2, rows, 2, columns, 3, generator=generator)


@given(SEEDS, st.lists(st.sampled_from([1, 2, 63, 70]), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_columns_are_kept_in_order_whatever_the_steps(seed, widths):
    generator, layer, parts = torch.Generator().manual_seed(seed), GrowingLayer(), []
    for width in widths:
        keys, values = states(generator, 2, width)
        parts.append((keys, values))
        found = layer.update(keys, values)
        for which in (0, 1):
            assert torch.equal(found[which], torch.cat([part[which] for part in parts], 2))
    assert layer.get_seq_length() == sum(widths)
    assert layer.get_mask_sizes(5) == (sum(widths) + 5, 0)


def filled(generator, rows, columns, layers=2):
    cache = RowCache()
    given = [states(generator, rows, columns) for _ in range(layers)]
    for number, (keys, values) in enumerate(given):
        cache.update(keys, values, number)
    return cache, given


def test_rows_are_selected_repeated_and_cut_at_the_left():
    cache, given = filled(torch.Generator().manual_seed(0), 4, 9)
    cache.select(torch.tensor([3, 1, 1]), 2)
    assert cache.get_seq_length() == 7
    for layer, (keys, values) in zip(cache.layers, given, strict=True):
        assert torch.equal(layer.keys, keys[[3, 1, 1]][:, :, 2:]) and torch.equal(
            layer.values, values[[3, 1, 1]][:, :, 2:]
        )


def test_rows_are_joined_at_their_right_end():
    generator = torch.Generator().manual_seed(1)
    for first_columns, second_columns in ((9, 4), (4, 9), (5, 5)):
        first, given = filled(generator, 2, first_columns)
        second, added = filled(generator, 3, second_columns)
        first.join(second)
        width = max(first_columns, second_columns)
        assert first.get_seq_length() == width
        for layer, (keys, _), (more, _) in zip(first.layers, given, added, strict=True):
            assert layer.keys.shape[0] == 5
            assert torch.equal(layer.keys[:2, :, width - first_columns :], keys)
            assert torch.equal(layer.keys[2:, :, width - second_columns :], more)
            assert (
                not layer.keys[:2, :, : width - first_columns].any()
                and not layer.keys[2:, :, : width - second_columns].any()
            )


def test_writing_goes_on_after_every_change():
    generator = torch.Generator().manual_seed(2)
    cache, _ = filled(generator, 2, 3, layers=1)
    cache.select(torch.tensor([1]))
    other, _ = filled(generator, 1, 3, layers=1)
    before = other.layers[0].keys.clone()
    cache.join(other)
    keys, values = states(generator, 2, 1)
    found, _ = cache.update(keys, values, 0)
    assert found.shape[2] == 4 and torch.equal(found[:, :, 3:], keys)
    assert torch.equal(other.layers[0].keys, before)  # The joined cache is a copy.


def test_layers_may_differ_in_shape_and_dtype():
    cache = RowCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 6), 0)
    cache.update(torch.ones(2, 2, 3, 4).bfloat16(), torch.ones(2, 2, 3, 4).bfloat16(), 1)
    cache.select(torch.tensor([0]))
    assert cache.layers[0].values.shape == (1, 1, 3, 6) and cache.layers[1].keys.dtype == torch.bfloat16
