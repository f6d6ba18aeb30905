from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edits.lora.export import shared
from edits.lora.factors import joined, missing, product_norm, rounding, truncated
from edits.lora.targets import Place

SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# Fewer factors where fewer do.


@given(SEEDS, st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_parallel_columns_are_joined_and_the_product_stays(seed: int, which: list[int]) -> None:
    vectors, rng = random(7, 3, seed=seed), np.random.default_rng(seed + 1)
    B = torch.stack([vectors[:, index] * float(rng.choice([-2.5, 0.3, 1.0])) for index in which], dim=1)
    A = random(len(which), 5, seed=seed + 2)
    fewer, columns = joined(A, B)
    assert fewer.shape[0] == len(set(which))
    assert torch.allclose(columns @ fewer, B @ A, atol=1e-12)


def test_a_column_without_a_parallel_keeps_its_bits() -> None:
    A, B = random(2, 5).float(), random(7, 2, seed=1).float()
    same = joined(A, B)
    assert torch.equal(same[0], A)
    assert torch.equal(same[1], B)


def test_what_adds_nothing_is_left_out() -> None:
    A, B = random(3, 5), random(7, 3, seed=1)
    A[0], B[:, 2] = 0, 0
    fewer, columns = joined(A, B)
    assert torch.equal(fewer, A[1:2])
    assert torch.equal(columns, B[:, 1:2])
    assert joined(A * 0, B)[0].shape == (0, 5)


# The decomposition.


@pytest.mark.parametrize(
    ("shape", "rank"), [((40, 90), 4), ((90, 40), 4), ((12, 9), 4), ((1, 30), 4), ((200, 150), 20)]
)
def test_the_error_is_that_of_the_best_factors(shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: the square root of the squared singular values that are cut off, here from LAPACK in float64."""
    decay = torch.linspace(0, -3, min(shape), dtype=torch.float64).exp()
    U, _, V = torch.linalg.svd(random(*shape), full_matrices=False)
    delta = U @ torch.diag(decay) @ V
    singular = np.linalg.svd(delta.numpy(), compute_uv=False)
    A, B = truncated(delta, rank)
    assert A.shape == (min(rank, *shape), shape[1])
    assert B.shape == (shape[0], min(rank, *shape))
    best = math.sqrt(float((singular[rank:] ** 2).sum()))
    assert missing(delta, A, B) <= 1.01 * best + 1e-9
    assert missing(delta, A, B) >= 0.999 * best - 1e-9


def test_a_difference_of_low_rank_is_found_exactly_and_gets_no_more() -> None:
    delta = random(120, 3) @ random(3, 80, seed=1)
    A, B = truncated(delta, 16)
    assert A.shape == (3, 80)
    assert torch.allclose(B @ A, delta, atol=1e-10)
    assert torch.allclose((A @ A.T).diag(), (B.T @ B).diag())
    assert truncated(delta * 0, 4)[0].shape == (0, 80)


def test_the_seed_decides() -> None:
    delta = random(120, 100).float()
    first, again, other = truncated(delta, 4, 1), truncated(delta, 4, 1), truncated(delta, 4, 2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@given(SEEDS)
def test_norms_are_those_of_the_dense_matrices(seed: int) -> None:
    A, B, delta = random(3, 11, seed=seed), random(6, 3, seed=seed + 1), random(6, 11, seed=seed + 2)
    assert product_norm(A, B) == pytest.approx(float((B @ A).norm()), rel=1e-9)
    assert missing(delta, A, B) == pytest.approx(float((delta - B @ A).norm()), rel=1e-9)
    for dtype in (torch.float32, torch.bfloat16):
        lost = float((B @ A - B.to(dtype).double() @ A.to(dtype).double()).norm())
        assert rounding(A, B, dtype) == pytest.approx(lost, rel=1e-5)
    assert rounding(A, B, torch.float64) == 0


# Experts.


def test_experts_are_laid_out_in_opposite_orders_and_ranks_add_up() -> None:
    """Row e·r + ρ of A and column ρ·E + e of B, rebuilt with plain loops; gate and up of an expert have own ranks."""
    experts, out, into, half = 3, 8, 5, 4
    at = {name: Place("m", "experts", "gate_up_proj", experts, 1, out, rows) for name, rows in
          {"gate": (0, half, 1), "up": (half, None, 1)}.items()}  # fmt: skip
    last = Place("m", "experts", "gate_up_proj", experts, 2, out, (0, None, 2))
    pairs = {
        at["gate"]: (random(2, into, seed=1), random(half, 2, seed=2)),
        at["up"]: (random(1, into, seed=3), random(half, 1, seed=4)),
        last: (random(1, into, seed=5), random(half, 1, seed=6)),
    }
    A, B, rank = shared(last.whole, pairs)
    assert (rank, A.shape, B.shape) == (3, (9, into), (out, 9))
    wanted = torch.zeros(experts, out, into, dtype=torch.float64)
    for place, (rows, columns) in pairs.items():
        assert place.rows is not None
        wanted[place.expert, slice(*place.rows)] += columns @ rows
    for expert in range(experts):
        found = torch.zeros(out, into, dtype=torch.float64)
        for rho in range(rank):
            found += torch.outer(B[:, rho * experts + expert], A[expert * rank + rho])
        assert torch.allclose(found, wanted[expert], atol=1e-12)
