"""Counting touched positions: runs of forward passes, passes that a place missed, and how a report shows itself."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Direction, Steering
from steer.phases import PHASES, phase_mask
from steer.report import Counter, Report, Tick


def ticks(states, phases=PHASES):
    totals = dict.fromkeys(phases, 0)
    return [Tick(number, state, 0, totals) for number, state in enumerate(states, 1)]


def random_states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-1, 4, (3, 1 + index % 4), generator=generator) for index in range(count)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("missed", [(), (0,), (3, 4), (9,), (0, 2, 4, 6, 8), tuple(range(10))])
def test_a_place_counts_the_passes_that_it_wrote_in(phase, missed):
    states = random_states(10)
    counter = Counter(phase)
    for index, tick in enumerate(ticks(states)):
        if index not in missed:
            counter.touch(tick)
            counter.touch(tick)  # A layer that is called twice in one pass counts once.
    assert counter.total() == sum(
        int(phase_mask(state, phase).sum()) for index, state in enumerate(states) if index not in missed
    )


def test_without_states_only_the_phase_all_counts():
    totals = dict.fromkeys(("all", "thinking"), 0)
    counters = [Counter("all"), Counter("thinking")]
    for number, real in enumerate((5, torch.tensor(2), 1), 1):
        tick = Tick(number, None, real, totals)
        for counter in counters:
            counter.touch(tick)
    assert [counter.total() for counter in counters] == [8, 0]


@pytest.mark.parametrize("dims", [3, 4])
def test_masks_fit_the_value_and_are_made_once(dims):
    states = random_states(1, seed=3)[0]
    (tick,) = ticks([states])
    value = torch.zeros(*states.shape, *[2] * (dims - 2))
    mask = tick.mask("thinking", value)
    assert mask.dim() == dims and torch.equal(mask.reshape(states.shape), states == 2)
    assert tick.mask("thinking", value) is mask
    weights = tick.weights("thinking", value, torch.float64)
    assert weights.dtype == torch.float64 and torch.equal(weights.bool(), mask)


def report():
    made = Report("late & <b>", 0.5)
    tick = ticks(random_states(1))[0]
    made.counter(2, "resid_post", "all").touch(tick)
    made.counter(1, "attn_out", "thinking")
    return made


def test_a_report_as_rows_table_text_and_html():
    made = report()
    total = int((random_states(1)[0] != -1).sum())
    assert made.touched == {(1, "attn_out"): {"thinking": 0}, (2, "resid_post"): {"all": total}}
    assert made.positions == total and made.untouched == [(1, "attn_out", "thinking")]
    assert made.rows()[1] == {"layer": 2, "site": "resid_post", "phase": "all", "positions": total}
    assert made.frame().positions.tolist() == [0, total]
    assert f"steered {total} positions" in str(made) and f"<td>{total}" in made._repr_html_()
    assert made.counter(2, "resid_post", "all") is made.counter(2, "resid_post", "all")
    assert Report("x", 0.0, idle="nothing <i>to</i> do")._repr_html_().count("<i>") == 0
    assert list(Report("x", 1.0).frame().columns) == ["layer", "site", "phase", "positions"]


def test_nested_contexts_each_count_their_own(tiny):
    model = steer.wrap(*tiny("llama"))
    d = Direction(torch.ones(1, 48), (1,), "resid_post")
    steering = Steering((Add(d, "resid_post"), Add(d, "resid_post", 2.0)))
    with model.steered(steering) as outer:
        model.run([[3, 4, 5]])
        with model.steered(steering) as inner:
            model.run([[3, 4], [5]])
        model.run([[3]])
    assert outer.touched == {(1, "resid_post"): {"all": 7}} and inner.touched == {(1, "resid_post"): {"all": 3}}
    assert outer.touched == outer.touched  # Reading twice gives the same.
