"""The methods on tensors: closed forms, invariances, and the naive formulas of `naive`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edits.merge.methods import dare, linear, slerp, task_arithmetic, ties
from steer.errors import SteerError
from tests.edits.merge import naive

SHAPE = (7, 11)


def tensors(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE, spread: float = 0.1) -> list[Tensor]:
    """A base and models near it, numbers of bf16 in float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).bfloat16()
    rest = [(base + spread * torch.randn(shape, generator=generator)).bfloat16() for _ in range(count - 1)]
    return [tensor.double() for tensor in (base, *rest)]


def close(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)


# linear


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_sum(normalize: bool) -> None:
    models, weights = tensors(3), [1.0, 0.5, -0.2]
    expected = naive.linear([model.numpy() for model in models], weights, normalize)
    close(linear.linear(models, weights, normalize=normalize), expected)


def test_linear_one_zero_is_the_first_bit_for_bit() -> None:
    first = torch.tensor([-0.0, 1.5, math.inf], dtype=torch.float64)
    found = linear.linear([first, torch.full((3,), math.nan, dtype=torch.float64)], [1.0, 0.0])
    assert torch.equal(found.view(torch.int64), first.view(torch.int64))


def test_linear_refuses_to_divide_by_nothing() -> None:
    with pytest.raises(SteerError, match="sum to 0 and are to be divided"):
        linear.linear(tensors(2), [1.0, -1.0])
    with pytest.raises(SteerError, match="weight 0"):
        linear.linear(tensors(2), [0.0, 0.0], normalize=False)


# task arithmetic


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic_is_base_plus_differences(normalize: bool, scale: float) -> None:
    base, *models = tensors(4)
    weights = [1.0, 0.5, -0.2]
    expected = naive.arithmetic(base.numpy(), [model.numpy() for model in models], weights, normalize, scale)
    close(task_arithmetic.task_arithmetic(base, models, weights, normalize=normalize, scale=scale), expected)


@given(st.integers(0, 10**6), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_one_model_of_weight_one_is_that_model(seed: int, dtype: torch.dtype) -> None:
    base, model = tensors(2, seed, spread=1.0)
    base, model = base.to(dtype).double(), model.to(dtype).double()
    found = task_arithmetic.task_arithmetic(base, [model], [1.0])
    assert torch.equal(found.to(dtype), model.to(dtype))
    assert torch.equal(ties.ties(base, [model], [1.0], [1.0]).to(dtype), model.to(dtype))


def test_weights_that_cancel_are_not_divided_by() -> None:
    base, model, other = tensors(3)
    plain = task_arithmetic.task_arithmetic(base, [model, other], [1.0, -1.0])
    assert torch.equal(task_arithmetic.task_arithmetic(base, [model, other], [1.0, -1.0], normalize=True), plain)
    close(plain, (base + model - other).numpy())


def test_no_weight_leaves_the_base() -> None:
    base, model = tensors(2)
    for found in (
        task_arithmetic.task_arithmetic(base, [model], [0.0]),
        task_arithmetic.task_arithmetic(base, [model], [1.0], scale=0.0),
        ties.ties(base, [model], [0.0], [0.5]),
        ties.ties(base, [model], [1.0], [0.0]),
        dare.dare(base, [model], [1.0], [0.0], name="x"),
    ):
        assert torch.equal(found, base)


# ties


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("densities", [[0.2, 0.5, 0.9], [1.0, 1.0, 1.0], [0.001, 0.5, 1.0]])
def test_ties_is_trim_elect_and_mean(normalize: bool, densities: list[float]) -> None:
    base, *models = tensors(4)
    weights = [1.0, 0.5, -0.7]
    trimmed = [naive.largest((model - base).numpy(), kept) for model, kept in zip(models, densities, strict=True)]
    expected = naive.agreed(base.numpy(), trimmed, weights, normalize, 0.8)
    close(ties.ties(base, models, weights, densities, normalize=normalize, scale=0.8), expected)


@given(
    st.lists(st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 2.0, 3.25, 1e-300, -5e-324]), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
)
def test_equal_magnitudes_are_kept_in_storage_order(values: list[float], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float64)
    found = ties.ties(torch.zeros_like(delta), [delta], [1.0], [density], normalize=False)
    assert found.tolist() == naive.largest(delta.numpy(), density).tolist()


def test_an_edge_is_found_over_pieces_and_counts_what_it_drops() -> None:
    delta = torch.arange(1, 101, dtype=torch.float64).repeat(3) * torch.tensor([1.0, -1.0]).double().repeat(150)
    edge = ties.find_edge(lambda: iter(delta.split(7)), 300, 0.5)
    assert (edge.magnitude, edge.equal, edge.among, edge.ties) == (51.0, 3, 3, 0)
    edge = ties.find_edge(lambda: iter(delta.split(7)), 300, 149 / 300)
    assert (edge.magnitude, edge.equal, edge.among, edge.ties) == (51.0, 2, 3, 1)


def test_an_edge_among_very_many_equal_numbers_is_found_digit_by_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties, "FEW", 1)
    values = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[100:300] = 0.25
    for density in (0.1, 0.5, 0.77, 0.999):
        found = values.clone()
        edge = ties.find_edge(lambda: iter(values.split(64)), 500, density)
        ties.trim_(found, edge, 0)
        assert found.tolist() == naive.largest(values.numpy(), density).tolist()


def test_signs_of_exactly_nothing_count_as_plus() -> None:
    base = torch.zeros(1, dtype=torch.float64)
    up, down = base + 1, base - 1
    assert ties.ties(base, [up, down], [1.0, 1.0], [1.0, 1.0]).item() == 1.0
    assert ties.ties(base, [base, base], [1.0, 1.0], [1.0, 1.0]).item() == 0.0


def test_rescaled_entries_keep_the_sum_of_magnitudes() -> None:
    base, model = tensors(2)
    found = ties.ties(base, [model], [1.0], [0.3], rescale=True) - base
    assert found.abs().sum().item() == pytest.approx((model - base).abs().sum().item(), rel=1e-12)


# dare


@pytest.mark.parametrize("consensus", [False, True])
def test_density_one_is_task_arithmetic_or_consensus(consensus: bool) -> None:
    base, *models = tensors(3)
    found = dare.dare(base, models, [0.5, 0.7], [1.0, 1.0], name="x", consensus=consensus)
    expected = (
        ties.ties(base, models, [0.5, 0.7], [1.0, 1.0], normalize=False)
        if consensus
        else task_arithmetic.task_arithmetic(base, models, [0.5, 0.7])
    )
    assert torch.equal(found, expected)


def test_the_expectation_over_masks_is_the_difference() -> None:
    base, model = tensors(2, shape=(20,))
    found = torch.stack(
        [dare.dare(base, [model], [1.0], [0.3], name="x", seed=seed, rescale="density") for seed in range(4000)]
    )
    delta = model - base
    error = delta.abs() * math.sqrt(0.7 / 0.3 / 4000)
    assert ((found.mean(dim=0) - base - delta).abs() < 5 * error + 1e-12).all()
    kept = (found != base).double().mean(dim=0)
    assert (kept - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 4000)


def test_rescaling_by_norm_keeps_the_sum_of_magnitudes() -> None:
    base, model = tensors(2)
    found = dare.dare(base, [model], [1.0], [0.4], name="x") - base
    assert found.abs().sum().item() == pytest.approx((model - base).abs().sum().item(), rel=1e-12)
    plain = dare.dare(base, [model], [1.0], [0.4], name="x", rescale=False) - base
    assert set((plain / (model - base)).nan_to_num().round(decimals=9).unique().tolist()) == {0.0, 1.0}


def test_masks_follow_from_seed_name_and_place() -> None:
    base, model = tensors(2, shape=(500,))

    def masked(**changes: object) -> Tensor:
        return dare.dare(base, [model], [1.0], [0.5], **{"name": "x", "seed": 0, **changes})  # type: ignore[arg-type]

    assert torch.equal(masked(), masked())
    assert not torch.equal(masked(), masked(seed=1))
    assert not torch.equal(masked(), masked(name="y"))
    both = dare.dare(base, [model, model], [1.0, 1.0], [0.5, 0.5], name="x", rescale=False) - base
    assert len((both / (model - base)).nan_to_num().round(decimals=6).unique()) == 3  # 0, 1 and 2 times


def test_a_mask_does_not_depend_on_its_pieces() -> None:
    whole = dare.Mask(3, "name", 1, 0.37).next(1000)
    mask = dare.Mask(3, "name", 1, 0.37)
    assert torch.equal(whole, torch.cat([mask.next(count) for count in (1, 499, 500)]))
    assert abs(whole.double().mean().item() - 0.37) < 0.06


# slerp


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.4, -0.2])
@pytest.mark.parametrize("spread", [0.001, 0.5, 3.0])
def test_slerp_is_the_formula(t: float, spread: float) -> None:
    first, second = tensors(2, spread=spread)
    close(slerp.slerp(first, second, t), naive.slerp(first.numpy(), second.numpy(), t))


def test_slerp_ends_are_the_models() -> None:
    first, second = tensors(2, spread=1.0)
    assert torch.equal(slerp.slerp(first, second, 0.0), first)
    assert torch.equal(slerp.slerp(first, second, 1.0), second)


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_slerp_of_equal_norms_keeps_the_norm(seed: int, t: float) -> None:
    first, second = tensors(2, seed, spread=1.0)
    second = second * (first.norm() / second.norm())
    assert slerp.slerp(first, second, t).norm().item() == pytest.approx(first.norm().item(), rel=1e-9)


def test_slerp_of_nearly_parallel_tensors_is_straight_and_says_so() -> None:
    first, second = tensors(2, spread=0.001)
    mixed = slerp.mix(0.25, [slerp.products(first.reshape(-1), second.reshape(-1))])
    assert mixed.straight and mixed.cosine > 0.9995 and (mixed.first, mixed.second) == (0.75, 0.25)
    close(slerp.slerp(first, second, 0.25), (0.75 * first + 0.25 * second).numpy())
    opposite = slerp.mix(0.25, [slerp.products(first.reshape(-1), -first.reshape(-1))])
    assert opposite.straight and opposite.cosine == pytest.approx(-1)


def test_slerp_of_zeros_and_of_infinities() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(slerp.slerp(zero, zero, 0.5), zero)
    with pytest.raises(SteerError, match="no angle"):
        slerp.slerp(zero, zero + math.inf, 0.5)
