"""Tables: slots are filled, kept while they are needed, and pushed out least lately used first; slot 0 says nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.backends.vllm.lowering import Lowered, Row, gate
from steer.backends.vllm.tables import WIDTH, Tables, change
from steer.errors import SteerError
from tests.steer.backends.vllm import fakes

ADD, PROJECT, SCALE, BIAS = (
    ("resid_post", "add", 1), ("attn_out", "project", 0), ("router", "scale", 2), ("router_logits", "bias", 2),
)  # fmt: skip
PLACES = (ADD, PROJECT, SCALE, BIAS)
SLOTS = 3


def lowered(seed: int) -> Lowered:
    """A steering that uses some of the places, told by its seed."""
    generator = torch.Generator().manual_seed(seed)
    phase = ("all", "prompt", "answer")[seed % 3]

    def numbers(width: int) -> torch.Tensor:
        return torch.randn(width, generator=generator)

    rows = {
        ADD: Row(gate(phase), vector=numbers(fakes.HIDDEN)),
        PROJECT: Row(gate(phase, 0.5), vector=numbers(fakes.HIDDEN)),
        SCALE: Row(gate(phase), factors=numbers(fakes.EXPERTS).abs(), renormalise=bool(seed % 2)),
        BIAS: Row(
            gate(phase),
            added=numbers(fakes.EXPERTS),
            inward=numbers(fakes.EXPERTS) > 1,
            outward=numbers(fakes.EXPERTS) < -1,
        ),
    }
    return Lowered({place: row for number, (place, row) in enumerate(rows.items()) if seed >> number & 1}, False, True, True)  # fmt: skip


def check(tables: Tables, slot: int, wanted: Lowered) -> None:
    """What a token of a slot meets is what the steering says, and nothing where it says nothing."""
    for place, table in tables.at.items():
        row = wanted.rows.get(place)
        gates = table["gate"][slot * WIDTH : (slot + 1) * WIDTH].tolist()
        assert gates == ([0.0] * WIDTH if row is None else list(row.gate))
        for name in table.keys() - {"gate"} if row is not None else ():
            found, expected = table[name][slot], torch.as_tensor(getattr(row, name))
            assert torch.equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=SLOTS, unique=True), min_size=1, max_size=12))
def test_whatever_came_before_a_step_finds_its_own_rows(steps: list[list[int]]) -> None:
    tables = fakes.tables_of(PLACES, slots=SLOTS)
    order: list[int] = []
    for step in steps:
        wanted = {str(seed): lowered(seed) for seed in step}
        before = dict(tables._held)
        slots = tables.slots_of(wanted)
        assert len(set(slots.values())) == len(step) and set(slots.values()) <= {1, 2, 3}
        for seed in step:
            check(tables, slots[str(seed)], wanted[str(seed)])
        order = [seed for seed in order if seed not in step] + sorted(step, key=lambda seed: str(seed) not in before)
        for seed in order[-SLOTS:]:  # What was used last is still where it was.
            assert str(seed) in tables._held
            assert str(seed) not in before or tables._held[str(seed)] == before[str(seed)]
        check(tables, 0, Lowered({}, False, False, False))
    assert bool((tables.at[SCALE]["factors"][0] == 1).all())


def test_more_steerings_than_slots_are_refused() -> None:
    with pytest.raises(SteerError, match="4 different steerings; expected at most the 3 slots"):
        fakes.tables_of(PLACES, slots=SLOTS).slots_of({str(seed): lowered(seed) for seed in range(1, 5)})


def test_a_step_is_told_and_the_rest_becomes_unsteered() -> None:
    tables = fakes.tables_of(PLACES)
    tables.tell(torch.tensor([4, 7, 0, 9]))
    tables.tell(torch.tensor([5]))
    assert tables.code.tolist() == [5] + [0] * 15 and tables.slot.tolist() == [1] + [0] * 15


def test_memory_is_counted() -> None:
    tables = fakes.tables_of((ADD,), slots=7)
    assert tables.bytes == 2 * 16 * 8 + 8 * fakes.HIDDEN * 4 + 8 * WIDTH * 4


def test_no_projection_makes_a_stream_infinite() -> None:
    """Layer after layer it multiplies; NaN in a cache block would reach whoever is given the block next."""
    unit = torch.zeros(2, fakes.HIDDEN)
    unit[1, 0] = 1.0
    gates = torch.zeros(2 * WIDTH)
    gates[WIDTH:] = -1e37
    table, one = {"vector": unit, "gate": gates}, torch.ones(1, dtype=torch.long)
    stream = torch.ones(1, fakes.HIDDEN)
    for _ in range(300):
        stream = stream + change(stream, table, None, one * WIDTH, one)
    assert bool(torch.isfinite(stream).all()) and float(stream[0, 0]) > 1e32 and bool((stream[0, 1:] == 1).all())
