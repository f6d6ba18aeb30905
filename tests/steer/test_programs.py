"""Programs: constants are merged, precision is kept, and factors follow the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steer import Add, Direction, ProjectOut, SetComponent, SteerError
from steer.interventions import delta
from steer.programs import HeadProgram, Program, Write, wide
from steer.report import Counter, Tick

WIDTH = 6


def tick(states=None):
    totals = {"all": 0, "thinking": 0}
    return Tick(1, states, 0, totals)


def write(intervention, c=1.0):
    return Write(intervention, c, Counter(intervention.phase))


def direction(seed=0, width=(WIDTH,), site="resid_post"):
    return Direction(torch.randn(1, *width, generator=torch.Generator().manual_seed(seed)), (2,), site)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_write_sees_its_predecessor_and_the_sum_is_cast_once(dtype):
    chain = [
        Add(direction(0), "resid_post"),
        ProjectOut(direction(1), "resid_post"),
        SetComponent(direction(2), "resid_post", 2.0),
        Add(direction(3), "resid_post", -0.5),
    ]
    value = torch.randn(2, 3, WIDTH).to(dtype)
    expected = value.to(torch.float64)
    for intervention in chain:
        expected = expected + delta(intervention, 2, expected)
    found = Program(2, [write(each) for each in chain]).write(value, tick())
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    if tolerance:
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    else:
        step = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)
        assert ((found.double() - expected).abs() <= 0.501 * step + 1e-5).all()  # Half a unit: one rounding.


@pytest.mark.parametrize(
    ("phases", "steps"),
    [(("all", "all", "all"), 1), (("all", "thinking", "all"), 3), (("thinking", "thinking", "all"), 2)],
)
def test_neighbouring_additions_of_one_phase_become_one_constant(phases, steps):
    program = Program(
        2, [write(Add(direction(seed), "resid_post", phase=phase), 0.5) for seed, phase in enumerate(phases)]
    )
    states = torch.tensor([[0, 2, 3]])
    value = torch.zeros(1, 3, WIDTH)
    found = program.write(value, tick(states))
    assert program.is_constant and len(next(iter(program._ready.values()))) == steps
    for index in range(3):
        acting = [seed for seed, phase in enumerate(phases) if phase == "all" or index == 1]
        torch.testing.assert_close(
            found[0, index], sum(0.5 * direction(seed)[2] for seed in acting) + torch.zeros(WIDTH)
        )


def test_a_direction_per_head_acts_per_head():
    d = direction(0, (2, 3), "z")
    value = torch.randn(1, 4, 2, 3)
    found = Program(2, [write(ProjectOut(d, "z"))]).write(value, tick())
    along = (found * d[2]).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-6)


def test_float64_stays_float64():
    assert wide(torch.float64) == torch.float64 and {
        wide(each) for each in (torch.float32, torch.bfloat16, torch.float16)
    } == {torch.float32}


def heads_write(heads, phase="all", weight=1.0, seed=0):
    return write(
        ProjectOut(direction(seed), "head_out", weight=weight, heads=tuple((2, head) for head in heads), phase=phase)
    )


def test_heads_equal_the_edited_weight():
    projection = nn.Linear(8, WIDTH, dtype=torch.float64)
    z = torch.randn(2, 3, 8, dtype=torch.float64)
    program = HeadProgram(2, [heads_write((0, 3)), heads_write((3,), weight=0.5, seed=1)], projection, 2)
    edited = projection.weight.detach().clone()
    for seed, weight, heads in ((0, 1.0, (0, 3)), (1, 0.5, (3,))):
        v = direction(seed)[2].double()
        for head in heads:
            block = edited[:, 2 * head : 2 * head + 2]
            edited[:, 2 * head : 2 * head + 2] = block - weight * torch.outer(v, v @ block) / (v @ v)
    torch.testing.assert_close(
        program.added(z, tick()), z @ (edited - projection.weight.detach()).T, rtol=1e-6, atol=1e-6
    )


def test_factors_are_made_again_only_when_the_weight_changes():
    projection = nn.Linear(8, WIDTH)
    program = HeadProgram(2, [heads_write((0,))], projection, 2)
    z = torch.randn(1, 1, 8)
    first = program.added(z, tick())
    factors = program._factors
    program.added(z, tick())
    assert program._factors is factors
    with torch.no_grad():
        projection.weight.mul_(2)
    torch.testing.assert_close(program.added(z, tick()), 2 * first)


def test_shared_heads_of_two_phases_are_refused():
    projection = nn.Linear(8, WIDTH)
    with pytest.raises(SteerError, match=r"(?i)head 3 of layer 2.*'all'.*'thinking'"):
        HeadProgram(2, [heads_write((0, 3)), heads_write((3,), "thinking")], projection, 2)
    HeadProgram(2, [heads_write((0, 3)), heads_write((1,), "thinking")], projection, 2)


def test_a_packed_weight_is_refused_with_a_remedy():
    projection = nn.Linear(8, WIDTH)
    projection.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    program = HeadProgram(2, [heads_write((0,))], projection, 2)
    with pytest.raises(SteerError, match=r"layer 2.*quantised.*attn_raw"):
        program.added(torch.randn(1, 1, 8), tick())
