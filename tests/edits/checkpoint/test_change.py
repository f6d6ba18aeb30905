"""Every figure of a change against numpy in float64, and ranks of differences that are known because they were made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edits.checkpoint import change, rows
from edits.checkpoint.change import LIMIT, change_of, same_rows
from edits.checkpoint.rows import Rows

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = st.sampled_from(list(NAMES))


def of(tensor: torch.Tensor, name: str | None = None) -> Rows:
    """A matrix in memory, read as one on disk is."""
    data = tensor.contiguous().view(torch.uint8).reshape(tensor.shape[0], -1).numpy().copy()
    word = name or NAMES[tensor.dtype]
    return Rows((tensor.shape[0], tensor.shape[1]), word, lambda start, stop: data[start:stop].reshape(-1).copy())


def low_rank(rows: int, columns: int, rank: int, size: float, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((rows, rank)))
    right, _ = np.linalg.qr(generator.standard_normal((columns, rank)))
    return torch.from_numpy(size * (left * np.linspace(1, 0.5, rank)) @ right.T)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    first=DTYPES,
    second=DTYPES,
    chunk=st.sampled_from([1, 7, 64, 1 << 18]),
    seed=st.integers(0, 100),
    kept=st.floats(0, 1),
)
def test_figures_are_those_of_numpy(
    shape: tuple[int, int], first: torch.dtype, second: torch.dtype, chunk: int, seed: int, kept: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator).to(first)
    b = torch.where(torch.rand(shape, generator=generator) < kept, a.double(), torch.randn(shape, generator=generator))
    b = b.to(second)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "CHUNK", chunk)
        found = change_of(of(a), of(b), 0)
        equal = same_rows(of(a), of(b))
    x, y = a.double().numpy(), b.double().numpy()
    assert found.entries == x.size and found.rank is None and found.not_finite == 0
    assert found.changed == np.count_nonzero(x != y)
    assert found.largest == np.max(np.abs(x - y))
    assert found.norm == pytest.approx(np.linalg.norm(x - y), rel=1e-12)
    if np.any(x):
        assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert equal == (first == second and np.array_equal(x, y))


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("shape", [(48, 64), (300, 130), (70, 400), (9, 200)])
def test_a_difference_of_known_rank_has_it_whatever_the_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Changes about as large as the weights; numpy's own rank of the exact difference of the stored numbers is full."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() * 0.02
    size = float(weights.norm()) * 0.3
    for rank in (1, 2, 5, 33, 64, 65, 70):
        if rank > min(shape):
            continue
        a = weights.to(dtype)
        b = (a.double() + low_rank(*shape, rank, size)).to(dtype)
        found = change_of(of(a), of(b))
        assert found.rank == min(rank, LIMIT + 1), rank
        assert 0.99 < found.captured <= 1 or rank > LIMIT
        if dtype == torch.bfloat16 and rank < 33:
            assert np.linalg.matrix_rank((a.double() - b.double()).numpy()) == min(shape)


def test_few_changed_columns_have_a_rank_of_their_own() -> None:
    """A projection of a sixteenth of the columns in bf16: one direction above the rounding, at full and at a tenth of its strength."""
    generator = torch.Generator().manual_seed(3)
    a = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    v = torch.randn(512, generator=generator).double()
    v /= v.norm()
    for weight, captured in ((1.0, 0.98), (0.3, 0.9)):
        wanted = a.double()
        wanted[:, 64:96] -= weight * torch.outer(v, v @ wanted[:, 64:96])
        found = change_of(of(a), of(wanted.bfloat16()))
        assert found.rank == 1 and found.captured > captured
        assert 32 / 512 * 0.4 < found.share <= 32 / 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_rounding_alone_explains_has_no_rank(dtype: torch.dtype) -> None:
    """The same numbers, rounded once more by hand: noise of half a unit in the last place, not a change of any rank."""
    exact = torch.randn(200, 300, generator=torch.Generator().manual_seed(5)).double() * 0.02
    shaken = exact * (1 + torch.finfo(dtype).eps * 0.4 * torch.randn(200, 300).sign())
    found = change_of(of(exact.to(dtype)), of(shaken.to(dtype)))
    assert found.changed > 10_000 and found.rank == 0 and found.captured == 0


def test_independent_weights_have_more_than_the_limit() -> None:
    a, b = (torch.randn(100, 90, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert change_of(of(a), of(b)).rank == LIMIT + 1
    assert change_of(of(a), of(b), 3).rank == 4
    assert change_of(of(a[:50]), of(b[:50])).rank == 50
    captured = change_of(of(a), of(b), 3).captured
    singular = np.linalg.svd((a - b).double().numpy(), compute_uv=False)
    best = np.sum(singular[:3] ** 2) / np.sum(singular**2)
    assert best * 0.5 < captured <= best


def test_the_rank_is_invariant() -> None:
    """Under a rotation, a permutation, a transposition and a common factor."""
    rows_, columns = 60, 80
    weights = torch.randn(rows_, columns, generator=torch.Generator().manual_seed(8)).double()
    delta = low_rank(rows_, columns, 4, 3.0)
    turn, _ = torch.linalg.qr(torch.randn(rows_, rows_, generator=torch.Generator().manual_seed(9)).double())
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(9))
    changed = weights + delta
    pairs = [(turn @ weights, turn @ changed), (weights[:, order], changed[:, order]), (weights.T, changed.T)]
    for first, second in [*pairs, (1e-120 * weights, 1e-120 * changed), (1e120 * weights, 1e120 * changed)]:
        assert change_of(of(first), of(second)).rank == 4


def test_the_figures_do_not_depend_on_how_often_they_are_measured() -> None:
    a, b = (torch.randn(100, 90, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert change_of(of(a), of(b)) == change_of(of(a), of(b))


def test_bits_count_and_values_where_dtypes_differ() -> None:
    a, b = torch.zeros(2, 3), torch.tensor([[0.0, -0.0, 1.0], [0.0, 0.0, 0.0]])
    found = change_of(of(a), of(b))
    assert (found.changed, found.largest, found.relative) == (2, 1.0, math.inf)
    assert change_of(of(a), of(b.bfloat16())).changed == 1
    same = change_of(of(b), of(b.bfloat16()))
    assert (same.changed, same.norm, same.rank) == (0, 0.0, None) and not same_rows(of(b), of(b.bfloat16()))


def test_what_is_not_finite_is_counted_apart() -> None:
    a = torch.tensor([[1.0, float("nan"), float("inf"), 2.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, float("nan"), 3.0, float("nan")], [1.0, 4.0, 1.0, 1.0]])
    found = change_of(of(a), of(b))
    assert (found.changed, found.not_finite, found.largest, found.norm) == (3, 2, 3.0, 3.0)
    assert found.before == 1 + 4 * 1.0 and found.rank == 1


def test_whole_numbers_and_eight_bit_floats_are_subtracted() -> None:
    a = torch.arange(12).reshape(3, 4)
    found = change_of(of(a, "I64"), of(a + 2, "I64"))
    assert (found.largest, found.changed, found.rank) == (2.0, 12, None)
    flags = torch.tensor([[True, False]])
    assert change_of(of(flags, "BOOL"), of(~flags, "BOOL")).largest == 1.0
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).to(torch.float8_e4m3fn)
    found = change_of(of(b, "F8_E4M3"), of((b.float() * 2).to(torch.float8_e4m3fn), "F8_E4M3"))
    assert found.relative == 1.0 and found.rank == 2
    waves = torch.tensor([[1 + 2j]], dtype=torch.complex64)
    assert change_of(of(waves, "C64"), of(waves + 1j, "C64")).largest == 1.0


def test_parts_add_up_to_the_whole() -> None:
    a, b = (torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    whole = change_of(of(a), of(b), 0)
    parts = change_of(of(a[:13]), of(b[:13]), 0) + change_of(of(a[13:]), of(b[13:]), 0)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-14) and parts.relative == pytest.approx(whole.relative)
    assert (parts.entries, parts.changed, parts.largest) == (whole.entries, whole.changed, whole.largest)
    slices = change_of(of(a), of(a + 1)) + change.Change()
    assert slices.rank == 1 and slices.captured == pytest.approx(1)
