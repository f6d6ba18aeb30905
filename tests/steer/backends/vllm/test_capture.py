"""Reading with vLLM, without vLLM: sums over chunks against a naive float64 rewrite, and layers that write what is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steer import Add, Direction, Steering
from steer.backends.vllm import capture_layers, layers
from steer.backends.vllm.capture import KEY, Wanted, joined, ranges_of, wanted_by
from steer.backends.vllm.capture_worker import Captured, inside
from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import lower
from steer.backends.vllm.request import effective
from steer.backends.vllm.tables import WIDTH, Tables
from steer.errors import SteerError
from tests.probes import made

HIDDEN, EXPERTS, CHOSEN = 3, 5, 2
PLACES = [("resid_mid", 0), ("resid_post", 1), ("router", 1)]


def captured(places: Sequence[tuple[str, int]] = PLACES, dtype: torch.dtype = torch.float32) -> Captured:
    return Captured(places, tokens=16, hidden=HIDDEN, experts=EXPERTS, chosen=CHOSEN, dtype=dtype, device="cpu")


def wanted(length: int, spans: Sequence[Sequence[int]], key: str = "a", rows: bool = True) -> Wanted:
    ranges = tuple(ranges_of(span) for span in spans)
    return Wanted(length, 1, ranges, ranges, rows, key)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, list[list[int]]]:
    """Chunks (position, count) of a prompt, perhaps begun again after a preemption; its length; spans of it."""
    length = draw(st.integers(1, 40))
    chunks: list[tuple[int, int]] = []
    at = 0
    again = draw(st.integers(0, 2))
    while at < length:
        count = min(draw(st.integers(1, 12)), length - at)
        chunks.append((at, count))
        at += count
        if again and draw(st.booleans()):
            again, at = again - 1, 0
    spans = draw(st.lists(st.sets(st.integers(0, length - 1)).map(sorted), min_size=1, max_size=3))
    return chunks, length, spans


@settings(deadline=None, max_examples=60)
@given(runs(), st.integers(0, 9))
def test_sums_over_chunks_are_those_of_the_whole(
    run: tuple[list[tuple[int, int]], int, list[list[int]]], seed: int
) -> None:
    """Chunks lie anywhere in the step, beside other rows; each position counts once, however often it was run."""
    chunks, length, spans = run
    random = np.random.default_rng(seed)
    values = {place: random.standard_normal((length, HIDDEN)) for place in PLACES[:2]}
    ids = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(length)])
    weights = random.random((length, CHOSEN))
    worker = captured()
    worker.add("r", {KEY: wanted(length, spans).to_dict()})
    for position, count in chunks:
        start = int(random.integers(0, 16 - count + 1))
        for buffer in (*worker.rows.values(), *worker.routers[1]):
            buffer.fill_(0 if buffer.dtype == torch.int32 else 1e9)
        part = slice(position, position + count)
        for place, buffer in worker.rows.items():
            buffer[start : start + count] = torch.from_numpy(values[place][part])
        worker.routers[1][0][start : start + count] = torch.from_numpy(ids[part])
        worker.routers[1][1][start : start + count] = torch.from_numpy(weights[part])
        worker.ran("r", start, count, position)
        worker.ran("unread", 0, 16, 0)
    taken = joined(worker.take(["a"]).values(), length)
    assert worker.take(["a"]) == {}
    for place, rows in values.items():
        np.testing.assert_allclose(taken.rows[place].numpy(), rows, atol=1e-6)
        for row, span in enumerate(spans):
            np.testing.assert_allclose(taken.sums[place][row].numpy(), rows[span].sum(0), atol=1e-4)
    for row, span in enumerate(spans):
        count, weight = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for token in span:
            for expert, share in zip(ids[token], weights[token], strict=True):
                count[expert] += 1
                weight[expert] += share
        assert taken.counts[1][row, :EXPERTS].tolist() == count.tolist()
        np.testing.assert_allclose(taken.counts[1][row, EXPERTS:].numpy(), weight, atol=1e-5)


def test_steps_add_up_in_float64() -> None:
    """2^25 + 1 is no float32: the second step would be lost in a float32 sum."""
    worker = captured([("resid_post", 0)])
    worker.add("r", {KEY: wanted(2, [[0, 1]], rows=False).to_dict()})
    for position, value in enumerate((2.0**25, 1.0)):
        worker.rows["resid_post", 0].fill_(value)
        worker.ran("r", 0, 1, position)
    taken = joined(worker.take(["a"]).values(), 2)
    assert taken.sums["resid_post", 0][0, 0] == 2**25 + 1
    assert not taken.rows


def test_half_precision_is_widened_before_it_is_added() -> None:
    worker = captured([("resid_post", 0)], torch.bfloat16)
    worker.add("r", {KEY: wanted(16, [range(16)]).to_dict()})
    worker.rows["resid_post", 0].fill_(1 + 2**-7)
    worker.ran("r", 0, 16, 0)
    taken = joined(worker.take(["a"]).values(), 16)
    assert taken.sums["resid_post", 0][0, 0] == 16 * (1 + 2**-7)
    assert taken.rows["resid_post", 0].dtype == torch.bfloat16


def test_a_request_that_is_not_finite_spoils_no_other() -> None:
    worker = captured([("resid_post", 0)])
    for name in ("a", "b"):
        worker.add(name, {KEY: wanted(2, [[0, 1]], name).to_dict()})
    worker.rows["resid_post", 0].fill_(1.0)[0, 0] = torch.nan
    worker.ran("a", 0, 2, 0)
    worker.ran("b", 2, 2, 0)
    found = worker.take(["a", "b"])
    assert joined([found["a"]], 2).sums["resid_post", 0].isnan().any()
    assert joined([found["b"]], 2).sums["resid_post", 0].isfinite().all()


def test_tokens_that_never_ran_are_missed() -> None:
    """As those out of the prefix cache: the first chunk begins behind them."""
    worker = captured()
    worker.add("r", {KEY: wanted(6, [[0, 5]]).to_dict()})
    worker.ran("r", 0, 4, 2)
    with pytest.raises(SteerError, match="vLLM ran 0 of the 6 tokens"):
        joined(worker.take(["a"]).values(), 6)
    with pytest.raises(SteerError, match="kept nothing"):
        joined([], 6)


def test_stages_of_a_pipeline_are_joined() -> None:
    stages = [captured([("resid_post", layer), ("router", layer)]) for layer in (0, 1)]
    for layer, stage in enumerate(stages):
        stage.add("r", {KEY: wanted(4, [[1, 2]]).to_dict()})
        stage.rows["resid_post", layer].fill_(layer + 1.0)
        stage.ran("r", 0, 4, 0)
    taken = joined([stage.take(["a"])["a"] for stage in stages], 4)
    assert {place: float(total[0, 0]) for place, total in taken.sums.items()} == {
        ("resid_post", 0): 2,
        ("resid_post", 1): 4,
    }
    assert sorted(taken.counts) == [0, 1]


def test_a_request_that_has_left_is_followed_no_more_and_what_it_gave_stays() -> None:
    worker = captured()
    worker.add("r", {KEY: wanted(4, [[0]]).to_dict()})
    worker.ran("r", 0, 2, 0)
    worker.remove("r")
    worker.ran("r", 0, 2, 2)
    worker.add("r again", {KEY: wanted(4, [[0]]).to_dict()})
    worker.ran("r again", 0, 2, 2)
    joined(worker.take(["a"]).values(), 4)


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_ranges_say_the_same_positions(positions: list[int]) -> None:
    ranges = ranges_of(positions)
    assert [at for start, stop in zip(ranges[::2], ranges[1::2], strict=True) for at in range(start, stop)] == positions
    assert inside([ranges], 0, 61)[0].nonzero().flatten().tolist() == positions
    assert all(stop < start for stop, start in zip(ranges[1::2], ranges[2::2], strict=False)), (
        "neighbours are one range"
    )


def test_a_range_stays_one() -> None:
    assert ranges_of(range(3, 9)) == (3, 9)
    assert ranges_of(range(3, 3)) == ()


def test_what_is_wanted_travels_as_plain_data() -> None:
    one = wanted(9, [[1, 2, 7], []])
    assert Wanted.from_dict(one.to_dict()) == one
    with pytest.raises(SteerError, match="rising"):
        Wanted(9, 1, ((3, 2),))
    with pytest.raises(SteerError, match="rising"):
        Wanted(9, 1, ((3, 10),))
    with pytest.raises(SteerError, match=KEY):
        Wanted.from_dict({"key": "a"})


def test_a_request_is_read_whole_or_not_at_all() -> None:
    one = wanted(9, [[1]])
    extra = {KEY: one.to_dict()}
    assert wanted_by(extra, PLACES, 9, True) == one
    assert wanted_by({}, PLACES, 9, None) is None
    for places, tokens, skips, said in (
        ((), 9, True, "not started for reading"),
        (PLACES, 8, True, "of a prompt of 8"),
        (PLACES, 9, None, "skip_reading_prefix_cache is None"),
    ):
        with pytest.raises(SteerError, match=re.escape(said)):
            wanted_by(extra, places, tokens, skips)


class _Part(nn.Module):
    """What a block writes: its input times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.factor


class _Layer(nn.Module):
    """As vLLM's: the stream is (hidden, residual), and comes as hidden alone first."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Part(0.5), _Part(0.25)

    def forward(self, positions, hidden_states, residual):  # type: ignore[no-untyped-def]
        residual = hidden_states if residual is None else hidden_states + residual
        residual = residual + self.self_attn(residual)
        return self.mlp(residual), residual


class _Attention(_Part):
    """As of Transformers: what it returns has its weights beside it, which nobody asked for."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


class _Wrapped(nn.Module):
    """As of Transformers: the whole stream comes and goes, with an axis of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(0.5), _Part(0.25)

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        stream = hidden_states + self.self_attn(hidden_states)[0]
        return stream + self.mlp(stream)


class _Model(nn.Module):
    def __init__(self, count: int, wrapped: bool) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.layers = nn.ModuleList((_Wrapped if wrapped else _Layer)() for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = None
        if self.wrapped:
            hidden = hidden[None]
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden[0]
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual=residual)
        assert residual is not None
        return hidden + residual


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_write_what_is_read_after_every_change(tmp_path, wrapped: bool) -> None:  # type: ignore[no-untyped-def]
    """By hand: x -> x + p, then per layer a = x/2 + q, m = x + a, x' = m + m/4 + r; one row is steered, one is not."""
    anatomy = made.model().anatomy
    count, hidden = anatomy.layers, anatomy.hidden

    def add(site: str, layer: int, value: float) -> Add:
        return Add(Direction(torch.full((1, hidden), value), (layer,), site), site)

    steering = Steering(
        (add("resid_pre", 0, 1.0), add("attn_out", 1, 2.0), add("mlp_out", 1, 8.0), add("resid_post", 1, 4.0))
    )
    places = [
        (site, layer) for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post") for layer in (0, 1, 2)
    ]
    declared = Declared.of(anatomy, tmp_path, [steering], slots=2, capture=places)
    model = _Model(count, wrapped)
    found = layers.decoder_layers(model, declared)
    tables = Tables(declared, layers.local_places(declared, found), 8, torch.device("cpu"))
    worker = Captured(declared.capture, tokens=8, hidden=hidden, experts=0, chosen=0, dtype=torch.float32, device="cpu")
    capture_layers.before(found, worker)
    layers.install(found, tables)
    capture_layers.after(found, worker, declared)
    acting = effective(steering, 1.0, None)
    assert acting is not None
    slot = tables.slots_of({"a": lower(acting)})["a"]
    tables.tell(torch.tensor([slot * WIDTH, 0]))
    model(torch.ones(2, hidden))
    for row, on in ((0, 1.0), (1, 0.0)):
        x = 1.0 + on
        for layer in (0, 1, 2):
            at_one = on if layer == 1 else 0.0
            attended = x / 2 + 2 * at_one
            middle = x + attended
            written = middle / 4 + 8 * at_one
            after = middle + written + 4 * at_one
            expected = {
                "resid_pre": x,
                "attn_out": attended,
                "resid_mid": middle,
                "mlp_out": written,
                "resid_post": after,
            }
            for site, value in expected.items():
                rows = worker.rows[site, layer]
                torch.testing.assert_close(
                    rows[row], torch.full((hidden,), value), msg=f"{site} of layer {layer}, row {row}"
                )
                assert not rows[2:].any(), "rows of no token"
            x = after
