"""Changed layers against the definition, in float64, for every style of layer; and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steer.backends.vllm import layers as in_layers
from steer.backends.vllm.lowering import Lowered, Row, gate
from steer.backends.vllm.tables import WIDTH
from steer.errors import SteerError
from steer.phases import PHASES, State, phase_mask
from tests.steer.backends.vllm import fakes

STATES = (State.PROMPT, State.OPENING, State.THINKING, State.ANSWER)
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
TOKENS = 5
KINDS = st.lists(st.sampled_from(("add", "project")), min_size=1, max_size=2, unique=True)


class Quiet(nn.Module):
    """Attention that returns something, token by token."""

    def forward(self, value: Tensor) -> Tensor:
        return value.flip(-1)


def model_of(style: str) -> fakes.Model:
    model = fakes.Model(style)
    for layer in model.model.layers:
        layer.self_attn.attn = Quiet()
    return model


def naive(layer: Any, style: str, given: Tensor, change: Any) -> Tensor:
    """The stream after a layer, by the definition of the sites: `change(site, value)` returns what is there."""

    def norm(value: Tensor) -> Tensor:
        return value / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(module: nn.Linear, value: Tensor) -> Tensor:
        return value @ module.weight.double().T + module.bias.double()

    after = norm if style == "normed" else (lambda value: value)
    multiplier = fakes.MULTIPLIER if style == "scaled" else 1.0
    stream = change("resid_pre", given)
    attention = linear(layer.self_attn.o_proj, norm(stream).flip(-1))
    stream = stream + change("attn_out", multiplier * after(attention))
    stream = stream + change("mlp_out", multiplier * after(torch.tanh(linear(layer.mlp.up, norm(stream)))))
    found: Tensor = change("resid_post", stream)
    return found


@settings(max_examples=25, deadline=None)
@given(
    style=st.sampled_from(["fused", "normed", "scaled"]),
    kinds=st.dictionaries(st.sampled_from(SITES), KINDS, min_size=1),
    phase=st.sampled_from(PHASES),
    seed=st.integers(0, 99),
)
def test_every_token_is_changed_by_its_own_slot_and_state(style: str, kinds: dict[str, list[str]], phase: str, seed: int) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    places = tuple((site, kind, 0) for site, several in kinds.items() for kind in several)
    tables, model = fakes.tables_of(places, style), model_of(style)
    layer = model.model.layers[0]
    in_layers.install({0: layer}, tables)
    rows: list[dict[Any, Row]] = []
    for _ in range(2):
        vectors = {place: torch.randn(fakes.HIDDEN, generator=generator) for place in places}
        rows.append({
            place: Row(gate(phase, 0.7 if place[1] == "project" else 1.0), vector=vector / (vector.norm() if place[1] == "project" else 1))
            for place, vector in vectors.items()
        })  # fmt: skip
    slots = tables.slots_of({str(number): Lowered(row, True, True, True) for number, row in enumerate(rows)})
    which = torch.randint(3, (TOKENS,), generator=generator).tolist()
    states = torch.randint(4, (TOKENS,), generator=generator).tolist()
    codes = [(slots[str(slot - 1)] if slot else 0) * WIDTH + state for slot, state in zip(which, states, strict=True)]
    tables.tell(torch.tensor(codes))
    hidden = torch.randn(TOKENS, fakes.HIDDEN, generator=generator)
    with torch.no_grad():
        output = layer(torch.arange(TOKENS), hidden.clone(), None)
    found = output if isinstance(output, Tensor) else output[0] + output[1]
    for token in range(TOKENS):
        acts = which[token] and bool(phase_mask(torch.tensor([[STATES[states[token]]]]), phase))
        row = rows[which[token] - 1] if acts else {}

        def change(site: str, value: Tensor, row: dict[Any, Row] = row) -> Tensor:
            if (site, "project", 0) in row:
                unit = row[site, "project", 0].vector.double()  # type: ignore[union-attr]
                value = value - 0.7 * unit * (unit @ value)
            if (site, "add", 0) in row:
                value = value + row[site, "add", 0].vector.double()  # type: ignore[union-attr]
            return value

        expected = naive(layer, style, hidden[token].double(), change)
        torch.testing.assert_close(found[token].double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsteered_tokens_and_undeclared_layers_stay_to_the_bit(dtype: torch.dtype) -> None:
    plain, model = (model_of("fused").to(dtype) for _ in range(2))
    places = tuple((site, kind, 1) for site in SITES[1:] for kind in ("add", "project"))
    tables = fakes.tables_of(places)
    names = list(model.state_dict())
    in_layers.install(in_layers.decoder_layers(model, tables.declared), tables)
    assert list(model.state_dict()) == names
    assert [type(layer).__name__ for layer in model.model.layers] == ["Layer", "SteeredLayer", "Layer"]
    hidden = torch.randn(TOKENS, fakes.HIDDEN).to(dtype)
    with torch.no_grad():
        for one, other in zip(plain.model.layers, model.model.layers, strict=True):
            expected, found = (layer(None, hidden.clone(), hidden.clone()) for layer in (one, other))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_stream_is_found_wherever_a_family_is_given_it() -> None:
    class Other(fakes.Layer):
        def forward(self, hidden_states: Tensor, positions: Tensor, residual: Tensor | None) -> Any:  # type: ignore[override]
            return super().forward(positions, hidden_states, residual)

    place = ("resid_pre", "add", 0)
    tables, hidden = fakes.tables_of((place,)), torch.randn(2, fakes.HIDDEN)
    vector = torch.randn(fakes.HIDDEN)
    (slot,) = tables.slots_of({"a": Lowered({place: Row(gate("all"), vector=vector)}, False, True, False)}).values()
    tables.tell(torch.tensor([slot * WIDTH, 0]))
    layer = Other("fused", fakes.Mlp())
    layer.self_attn.attn = Quiet()
    moved = hidden + torch.stack([vector, torch.zeros(fakes.HIDDEN)])
    with torch.no_grad():
        expected = layer(moved.clone(), None, None)
        in_layers.install({0: layer}, tables)
        by_place, by_name = layer(hidden.clone(), None, None), layer(hidden_states=hidden.clone(), positions=None, residual=None)  # fmt: skip
    for found in (by_place, by_name):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_layers_and_parts_that_are_not_known_are_refused() -> None:
    class Unnamed(fakes.Layer):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x

    class Two(fakes.Mlp):
        def forward(self, hidden: Tensor) -> Any:
            return hidden, hidden

    with pytest.raises(SteerError, match=r"Unnamed is called with self, x; expected hidden_states among them"):
        in_layers.install({0: Unnamed("fused", fakes.Mlp())}, fakes.tables_of((("resid_post", "add", 0),)))
    layer = fakes.Layer("fused", Two())
    in_layers.install({0: layer}, fakes.tables_of((("mlp_out", "add", 0),)))
    with pytest.raises(SteerError, match="writes mlp_out returns tuple"):
        layer(None, torch.zeros(1, fakes.HIDDEN), None)


def test_stages_of_a_pipeline_keep_their_own_layers() -> None:
    class PPMissingLayer(nn.Identity):
        pass

    model, tables = fakes.Model(), fakes.tables_of((("resid_post", "add", 0), ("resid_post", "add", 2)))
    model.model.layers[0] = PPMissingLayer()
    layers = in_layers.decoder_layers(model, tables.declared)
    assert sorted(layers) == [1, 2]
    assert in_layers.local_places(tables.declared, layers) == [("resid_post", "add", 2)]


def test_vllms_own_names_of_parts_are_found() -> None:
    declared = fakes.tables_of(()).declared
    layer = nn.Module()
    layer.attn, layer.block_sparse_moe = nn.Identity(), nn.Identity()
    assert in_layers.part_of(layer, 0, "attn_out", declared) is layer.attn
    assert in_layers.part_of(layer, 0, "mlp_out", declared) is layer.block_sparse_moe
