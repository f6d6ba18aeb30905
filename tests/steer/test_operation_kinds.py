"""Every operation against numpy in float64, for all dtypes, slices, bounds of pieces, layouts and origins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.operations import (
    AddBias,
    AddDense,
    AddLowRank,
    Matrix,
    Operation,
    ProjectColumns,
    Region,
    Scale,
    SetSlice,
    Survival,
    edit_,
    edited,
    low_rank,
    reduces,
    region,
    tensor_hash,
)
from steer.operations import edit as module

W = Matrix(0, "attention_output")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
KINDS = ("project_out", "scale", "add_low_rank", "add_dense", "set_slice")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(weight: torch.Tensor, operations: list[Operation], width: int) -> np.ndarray:
    """Each formula written out in numpy, whole matrices at a time."""
    found = weight.double().numpy().copy()
    for each in operations:
        heads = each.heads
        chosen = (
            np.arange(found.shape[1])
            if heads is None
            else np.concatenate([np.arange(h * width, (h + 1) * width) for h in heads])
        )
        if isinstance(each, ProjectColumns):
            v = each.vector.double().numpy()
            found[:, chosen] = (np.eye(len(v)) - each.weight * np.outer(v, v) / (v @ v)) @ found[:, chosen]
        elif isinstance(each, Scale):
            found[:, chosen] *= 1 + each.weight * (each.factor - 1)
        elif isinstance(each, AddLowRank):
            found += each.weight * (each.B.double().numpy() @ each.A.double().numpy())
        elif isinstance(each, AddDense):
            found += each.weight * torch.as_tensor(each.delta).double().numpy()
        elif isinstance(each, SetSlice) and each.weight:
            found[each.rows[0] : each.rows[1], each.columns[0] : each.columns[1]] = each.values.double().numpy()
        elif isinstance(each, AddBias):
            found += each.weight * each.vector.double().numpy()[:, None]
    return found


Case = tuple[torch.Tensor, list[Operation], int]


def recipe(kind: str, shape: tuple[int, int], heads: int, draw: Any) -> Callable[[], Operation]:
    """Draw the numbers of an operation, which is made in the test: what checks types there rolls dice."""
    out, into = shape
    weight, seed = draw(st.floats(-2, 2)), draw(st.integers(0, 9))
    some = draw(st.none() | st.sets(st.integers(0, heads - 1), min_size=1).map(tuple))
    if kind == "project_out":
        return lambda: ProjectColumns(0, "attention_output", some, normal(out, seed=seed), weight)
    if kind == "scale":
        factor = draw(st.floats(-2, 2))
        return lambda: Scale(W, factor, some, weight)
    if kind == "add_low_rank":
        rank = draw(st.integers(1, 3))
        return lambda: AddLowRank(W, normal(rank, into, seed=seed), normal(out, rank, seed=seed + 1), weight)
    if kind == "add_dense":
        dtype = draw(st.sampled_from(DTYPES))
        return lambda: AddDense(W, normal(out, into, seed=seed, dtype=dtype), weight)
    rows, columns = (draw(bounds(size)) for size in shape)
    on = draw(st.sampled_from([0, 1]))
    values = (rows[1] - rows[0], columns[1] - columns[0])
    dtype = draw(st.sampled_from(DTYPES))
    return lambda: SetSlice(W, rows, columns, normal(*values, seed=seed, dtype=dtype), on)


def bounds(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Start and stop of a slice that is not empty."""
    return st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True).map(lambda pair: (min(pair), max(pair)))


@st.composite
def cases(draw: Any) -> Callable[[], Case]:
    heads, width, out = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 20))
    shape, kinds = (out, heads * width), draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    recipes = [recipe(kind, shape, heads, draw) for kind in kinds]
    seed, dtype = draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES))

    def made() -> Case:
        operations = [each() for each in recipes]
        for operation in operations:
            operation.check(shape, heads)
        return normal(*shape, seed=seed, dtype=dtype), operations, width

    return made


@settings(max_examples=150, deadline=None)
@given(case=cases(), block=st.sampled_from([1, 7, 64, 1 << 18]), least=st.sampled_from([1, 3, 64]))
def test_is_the_naive_result_rounded_once(case: Callable[[], Case], block: int, least: int) -> None:
    weight, operations, width = case()
    exact = naive(weight, operations, width)
    expected = edited(weight, operations, width)
    scale = max(1.0, float(np.abs(exact).max()))
    tiny = 2.0**-25 if weight.dtype == torch.float16 else 0.0
    error = np.abs(expected.double().numpy() - exact)
    assert (error <= HALF[weight.dtype] * np.abs(exact) + 1e-13 * scale + tiny).all()
    with pytest.MonkeyPatch.context() as patch:  # The bounds of pieces, the layout and the alignment change no bit.
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "WIDTH", least)
        turned = weight.t().clone(memory_format=torch.contiguous_format).t()
        survival = edit_(turned, operations, width)
    assert tensor_hash(turned) == tensor_hash(expected)
    wanted = np.linalg.norm(exact - weight.double().numpy())
    assert survival.wanted == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_a_part_of_a_matrix_is_edited_as_the_whole_is(case: Callable[[], Case], data: Any) -> None:
    weight, operations, width = case()
    expected = edited(weight, operations, width)
    out, into = weight.shape
    whole = reduces(operations)
    top, bottom = (0, out) if whole else data.draw(bounds(out))
    left, right = data.draw(bounds(into))
    part = weight[top:bottom, left:right].clone()
    edit_(part, operations, width, (top, left))
    assert tensor_hash(part) == tensor_hash(expected[top:bottom, left:right])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_nothing_changes_outside_of_the_region(case: Callable[[], Case]) -> None:
    weight, operations, width = case()
    changed = (edited(weight, operations, width).view(torch.uint8) != weight.contiguous().view(torch.uint8)).numpy()
    changed = changed.reshape(*weight.shape, -1).any(-1)
    where = region(operations, (weight.shape[0], weight.shape[1]), width)
    allowed = np.zeros(weight.shape, dtype=bool)
    for columns in where.columns:
        allowed[where.rows, columns] = True
    assert not (changed & ~allowed).any()
    assert all(a.stop < b.start for a, b in zip(where.columns, where.columns[1:], strict=False))


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_strength_zero_leaves_every_byte(case: Callable[[], Case]) -> None:
    weight, operations, width = case()
    weight.view(-1)[0] = -0.0
    before = tensor_hash(weight)
    off = [operation.scaled(0) for operation in operations]
    assert edit_(weight, off, width) == Survival() and tensor_hash(weight) == before
    assert region(off, (weight.shape[0], weight.shape[1]), width) == Region(slice(0, 0), ())


def test_what_is_set_is_set_exactly_whatever_was_there() -> None:
    """block + (values - block) would lose a small number beside a large one."""
    weight = torch.full((3, 4), 1e30)
    values = torch.tensor([[1e-30, -0.0], [3.0, 1e-38]])
    edit_(weight, [SetSlice(W, (1, 3), (0, 2), values)], 4)
    assert tensor_hash(weight[1:, :2]) == tensor_hash(values) and float(weight[0, 0]) == pytest.approx(1e30)


def test_values_are_kept_apart_from_what_later_operations_make_of_them() -> None:
    """In float64 the values need no conversion, so a view of them would be written into."""
    values = normal(4, 3, dtype=torch.float64)
    operations = [SetSlice(W, (0, 4), (0, 3), values), SetSlice(W, (1, 2), (0, 3), torch.zeros(1, 3))]
    first, second = (edited(normal(4, 3), operations, 3) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(operations[0].values, values)
    assert torch.equal(first[0], values[0].float()) and not first[1].any()


def test_a_bias_is_a_matrix_of_one_column() -> None:
    bias = normal(6)
    operations: list[Operation] = [
        AddBias(2, "attention_output", normal(6, seed=1), 0.5),
        ProjectColumns(2, "attention_output", None, normal(6, seed=2), bias=True),
    ]
    assert [operation.matrix for operation in operations] == [Matrix(2, "attention_output", bias=True)] * 2
    found = bias.clone()
    edit_(found[:, None], operations, 1)
    np.testing.assert_allclose(found.numpy(), naive(bias[:, None], operations, 1)[:, 0], rtol=0, atol=1e-7)


def test_the_embedding_is_edited_through_its_transpose() -> None:
    stored, v = normal(30, 8), normal(8, seed=1)
    expected = stored.double() - torch.outer(stored.double() @ v.double(), v.double()) / (v.double() @ v.double())
    edit_(stored.T, [ProjectColumns(-1, "embedding", None, v)], 1)
    torch.testing.assert_close(stored.double(), expected, rtol=0, atol=1e-6)


class Counted:
    """A difference that knows what was read of it."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.largest = whole.double(), 0

    @property
    def shape(self) -> tuple[int, int]:
        return (self.whole.shape[0], self.whole.shape[1])

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        piece = self.whole[rows, columns]
        self.largest = max(self.largest, piece.numel())
        return piece

    def digest(self) -> str:
        return tensor_hash(self.whole)


def test_a_difference_is_read_piece_by_piece() -> None:
    delta, weight = normal(40, 30), normal(40, 30, seed=1)
    source = Counted(delta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 64)
        found = edited(weight, [AddDense(W, source, 0.25)], 30)
    assert torch.equal(found, edited(weight, [AddDense(W, delta, 0.25)], 30))
    assert 0 < source.largest <= 64


def test_additions_of_a_dtype_of_their_own_are_not_rounded_first() -> None:
    weight = torch.ones(1, 1)
    delta = torch.tensor([[2.0**-30]], dtype=torch.float64)
    many = [AddDense(W, delta)] * (1 << 7)
    assert float(edited(weight, many, 1)) == 1 + 2.0**-23


@settings(max_examples=40, deadline=None)
@given(case=cases(), dtype=st.sampled_from([None, torch.float64]))
def test_factors_are_the_change_where_there_are_factors(case: Callable[[], Case], dtype: torch.dtype | None) -> None:
    weight, operations, width = case()
    kept = [each for each in operations if isinstance(each, ProjectColumns | AddLowRank)]
    if len(kept) < len(operations):
        with pytest.raises(SteerError, match="low rank"):
            low_rank(weight, operations, width)
    if not kept:
        return
    A, B = low_rank(weight, kept, width, dtype)
    wide = dtype or torch.promote_types(weight.dtype, torch.float32)
    assert (A.dtype, B.dtype) == (wide, wide)
    exact = naive(weight, kept, width) - weight.double().numpy()
    scale = max(1.0, float(np.abs(exact).max()), float(A.abs().max()) * float(B.abs().max()))
    np.testing.assert_allclose(
        (B.double() @ A.double()).numpy(), exact, rtol=0, atol=(1e-12 if wide == torch.float64 else 2e-6) * scale
    )


# Refusals.

SENSELESS: list[tuple[Any, str]] = [
    (lambda: Scale(W, math.inf), "finite"),
    (lambda: Scale(W, 2.0, ()), "no head"),
    (lambda: Scale(Matrix(0, "mlp_output"), 2.0, (1,)), "attention_output alone"),
    (lambda: Scale(Matrix(-1, "model.layers.0.self_attn.q_proj.weight"), 2.0, (1,)), "attention_output alone"),
    (lambda: AddLowRank(W, torch.ones(2, 3), torch.ones(4, 1)), "rank"),
    (lambda: AddLowRank(W, torch.ones(1, 3), torch.full((4, 1), math.nan)), "finite"),
    (lambda: AddDense(W, torch.ones(2, 2, dtype=torch.int8)), "dtype"),
    (lambda: AddDense(W, torch.ones(2, 2), math.nan), "finite"),
    (lambda: AddBias(0, "attention_output", torch.full((3,), math.inf)), "finite"),
    (lambda: SetSlice(W, (0, 2), (0, 2), torch.ones(2, 2), 0.5), "add_dense"),
    (lambda: SetSlice(W, (2, 2), (0, 2), torch.ones(0, 2)), "start, stop"),
    (lambda: SetSlice(W, (0, 2), (0, 2), torch.ones(2, 3)), "shape"),
    (lambda: ProjectColumns(0, "attention_output", (0,), torch.ones(3), bias=True), "bias"),
    (lambda: ProjectColumns(0, "expert_down", None, torch.ones(3)), "expert"),
    (lambda: Scale(Matrix(0, "embedding"), 2.0), "outside"),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("made", "word"), SENSELESS)
def test_senseless_operations_are_refused(made: Any, word: str) -> None:
    with pytest.raises(SteerError, match=word):
        made()


MISFITS: list[tuple[Operation, str]] = [
    (AddLowRank(W, torch.ones(1, 3), torch.ones(4, 1)), "shape"),
    (AddDense(W, torch.ones(4, 5)), "shape"),
    (AddBias(0, "mlp_output", torch.ones(5)), "shape"),
    (SetSlice(W, (0, 7), (0, 1), torch.ones(7, 1)), "within"),
    (Scale(W, 2.0, (3,)), "heads 0 to 2"),
    (Scale(W, 2.0, (1,)), "whole number of columns"),
]


@pytest.mark.parametrize(("operation", "word"), MISFITS)
def test_operations_are_checked_against_the_matrix(operation: Operation, word: str) -> None:
    with pytest.raises(SteerError, match=word):
        operation.check((6, 4), 3)


@pytest.mark.parametrize(
    "operation", [Scale(W, 1e6), AddDense(W, torch.full((3, 4), 7e4)), AddDense(W, torch.full((3, 4), math.nan))]
)
def test_numbers_that_the_dtype_cannot_hold_are_refused(operation: Operation) -> None:
    weight = torch.ones(3, 4, dtype=torch.float16)
    with pytest.raises(SteerError, match="12 numbers of layer 0, attention_output") as caught:
        edit_(weight, [operation], 4)
    assert "65504" in str(caught.value) and "float32" in caught.value.remedy
    assert torch.equal(weight, torch.ones(3, 4, dtype=torch.float16))


def test_numbers_that_were_infinite_before_are_let_be() -> None:
    weight = torch.tensor([[math.inf, 1.0], [math.nan, -math.inf]])
    edit_(weight, [Scale(W, 2.0)], 2)
    assert torch.equal(weight.nan_to_num(7.0), torch.tensor([[math.inf, 2.0], [math.nan, -math.inf]]).nan_to_num(7.0))


def test_a_projection_refuses_a_part_of_its_columns() -> None:
    with pytest.raises(SteerError, match="whole columns"):
        edit_(torch.ones(3, 4), [ProjectColumns(0, "mlp_output", None, torch.ones(6))], 4, (3, 0))


def test_values_are_set_or_not() -> None:
    setting = SetSlice(W, (0, 1), (0, 1), torch.ones(1, 1))
    assert setting.scaled(1) is not setting and setting.scaled(0).weight == 0
    with pytest.raises(SteerError, match=r"scale 0\.5"):
        setting.scaled(0.5)


def test_every_kind_is_an_operation() -> None:
    for each in (Scale(W, 2.0), AddDense(W, torch.ones(2, 2)), AddBias(0, "mlp_output", torch.ones(2))):
        assert isinstance(each, Operation)
        assert each.as_json()["operation"] in ("scale", "add_dense", "add_bias")


def test_a_whole_scale_is_its_factor_unrounded() -> None:
    """1 + (2^-60 - 1) is 0 in float64, and 1 + (0.1 - 1) is not 0.1."""
    for factor in (2.0**-60, 0.1, 3.0):
        assert Scale(Matrix(0, "expert_down", 0), factor).effective == factor
    assert Scale(Matrix(0, "expert_down", 0), 5.0, weight=0.5).effective == 3.0
    weight = torch.tensor([[1.0, -3.0]])
    assert torch.equal(edited(weight, [Scale(Matrix(0, "expert_down", 0), 2.0**-60)], 1), weight * 2.0**-60)
