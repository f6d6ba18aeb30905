"""Our names of tensors, on disk and in memory, against transformers' own conversion tables, for every family."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from steer.anatomy import Anatomy, read_headers, resolve
from steer.anatomy.record import bundled
from steer.anatomy.slots import Matrix
from tests import conversions
from tests.tiny import FAMILIES, build

LAYOUTS = {"as published": True, "fused": False}
RENAMED = [family for family in FAMILIES if (record := bundled(family)) is not None and record.disk.prefixes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family, layout) -> (folder's headers, its anatomy, the model)`."""

    @cache
    def make(family, layout):
        folder = tmp_path_factory.mktemp(family)
        model = build(family).model
        model.save_pretrained(folder, save_original_format=LAYOUTS[layout])
        headers = read_headers(folder)
        return headers, resolve(headers.config, headers.shapes), model

    return make


def expected(where, state):
    """Transformers' answer, in the words of a slot."""
    width = state[where.parameter].shape[1] // where.parts if where.parts > 1 else 0
    return where.parameter, where.expert, (where.part * width, (where.part + 1) * width, 1) if where.parts > 1 else None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_is_put_where_transformers_puts_it(saved, family, layout):
    headers, anatomy, model = saved(family, layout)
    empty = conversions.empty(model.config)
    state = empty.state_dict()
    found = conversions.memory_of(empty, headers.tensors)
    for name, where in found.items():
        slot = anatomy.in_memory(Matrix(-1, name))
        assert (slot.name, slot.expert, slot.rows) == expected(where, state), name
        assert anatomy.on_disk(Matrix(-1, name)).name == name
    tied = {"lm_head.weight"} if anatomy.tied else set()
    assert {where.parameter for where in found.values()} == set(state) - tied


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_would_store_lies_in_the_slot(saved, family):
    headers, anatomy, model = saved(family, "as published")
    state = {
        name: value for name, value in model.state_dict().items() if not (anatomy.tied and name == "lm_head.weight")
    }
    stored = conversions.stored(model, state)
    assert stored.keys() == headers.tensors.keys()
    for name, tensor in stored.items():
        slot = anatomy.in_memory(Matrix(-1, name))
        part = slot.view(state[slot.name])
        assert torch.equal(part.reshape(tensor.shape), tensor), name


@pytest.mark.parametrize("family", RENAMED)
def test_prefixes_are_those_that_transformers_takes_away(saved, family):
    headers, _, model = saved(family, "as published")
    empty = conversions.empty(model.config)
    for prefix, meant in bundled(family).disk.prefixes.items():
        shapes = {
            prefix + name.removeprefix(meant) if name.startswith(meant) else name: entry
            for name, entry in headers.shapes.items()
        }
        anatomy = resolve(headers.config, shapes)
        for name, where in conversions.memory_of(empty, shapes).items():
            slot = anatomy.in_memory(Matrix(-1, name))
            assert (slot.name, slot.expert, slot.rows) == expected(where, empty.state_dict()), name
        for word in ("attention_output", "mlp_output", "router", "expert_down", "shared_expert_output", "embedding"):
            assert all(anatomy.on_disk(matrix).name in shapes for matrix in anatomy.matrices(word)), word
        assert anatomy.disk_name("attention_output", 1).startswith(prefix)


def test_prefixes_are_taken_away_nowhere_else(saved):
    for family in set(FAMILIES) - set(RENAMED):
        _, anatomy, model = saved(family, "as published")
        empty = conversions.empty(model.config)
        name = f"{anatomy.record.model.layers}.1.self_attn.o_proj.weight".removeprefix("model.")
        for prefix in ("model.language_model.", "language_model.model."):
            assert conversions.memory_of(empty, [prefix + name])[prefix + name].parameter not in empty.state_dict(), (
                family
            )


def test_both_layouts_are_one_model(saved):
    for family in FAMILIES:
        (_, published, _), (_, fused, _) = (saved(family, layout) for layout in LAYOUTS)
        assert isinstance(published, Anatomy) and published.numbers() == fused.numbers()
        assert (published.experts, published.expert_width, published.expert_layers) == (
            fused.experts,
            fused.expert_width,
            fused.expert_layers,
        )
