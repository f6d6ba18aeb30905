"""The pure edit function against numpy float64, closed forms and invariances (thinkedit.md §1.9 a, b, c, i)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.operations import ProjectColumns, Survival, edit_, edited, edited_blocks, low_rank, tensor_hash
from steer.operations import edit as module

OUT, HEADS = 48, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, HEADS * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direction(seed: int = 1) -> torch.Tensor:
    return torch.randn(OUT, generator=torch.Generator().manual_seed(seed))


def project(*heads: int, weight: float = 1.0, seed: int = 1, vector: torch.Tensor | None = None) -> ProjectColumns:
    return ProjectColumns(0, "attention_output", heads, direction(seed) if vector is None else vector, weight)


def naive(weight: torch.Tensor, operations: list[ProjectColumns], width: int) -> np.ndarray:
    """The matrix of Eq. 6 written out in numpy, head by head."""
    result = weight.double().numpy().copy()
    for operation in operations:
        v = operation.vector.double().numpy()
        projector = np.eye(OUT) - operation.weight * np.outer(v, v) / (v @ v)
        for head in operation.heads:
            result[:, head * width : (head + 1) * width] = projector @ result[:, head * width : (head + 1) * width]
    return result


def test_agrees_with_the_matrix_of_the_paper_in_float64() -> None:
    weight = weights(dtype=torch.float64)
    operations = [project(0, 3), project(3, 5, weight=0.4, seed=2), project(3, weight=-1.5, seed=1)]
    np.testing.assert_allclose(edited(weight, operations, 8).numpy(), naive(weight, operations, 8), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_is_the_exact_result_rounded_once(dtype: torch.dtype, step: float) -> None:
    weight = weights(dtype=dtype)
    operations = [project(1, 2), project(2, 4, seed=2)]
    exact = naive(weight, operations, 8)
    error = np.abs(edited(weight, operations, 8).double().numpy() - exact)
    assert (error <= step * np.abs(exact) + 1e-14 + (2**-25 if dtype == torch.float16 else 0)).all()


def test_nothing_is_left_along_the_direction_in_float32() -> None:
    weight, operation = weights(), project(1, 4)
    v = direction().double() / direction().double().norm()
    before = (v @ weight.double())[8:16].abs().max()
    after = (v @ edited(weight, [operation], 8).double())[8:16].abs().max()
    assert after <= 1e-6 * before


@pytest.mark.parametrize("aligned", [False, True])
def test_little_is_left_along_the_direction_in_bfloat16(aligned: bool) -> None:
    weight = torch.randn(512, 6 * 64, generator=torch.Generator().manual_seed(0))
    vector = torch.randn(512, generator=torch.Generator().manual_seed(1))
    v = vector.double() / vector.double().norm()
    if aligned:
        weight = weight + 16 * torch.outer(v.float(), torch.sign(torch.randn(6 * 64)))
    stored = weight.bfloat16()
    after = edited(stored, [project(2, vector=vector)], 64).double()[:, 128:192]
    before = stored.double()[:, 128:192]
    assert (v @ after).norm() <= (1e-3 if aligned else 1e-2) * (v @ before).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_columns_keep_their_bytes_and_the_argument_is_not_changed(dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    copy = weight.clone()
    result = edited(weight, [project(1, 4)], 8)
    assert torch.equal(weight, copy)
    untouched = [column for column in range(48) if column // 8 not in (1, 4)]
    assert tensor_hash(result[:, untouched]) == tensor_hash(weight[:, untouched])
    assert not torch.equal(result[:, 8:16], weight[:, 8:16])


def test_is_idempotent_up_to_rounding() -> None:
    once = edited(weights(), [project(0, 1)], 8)
    assert (edited(once, [project(0, 1)], 8) - once).abs().max() <= 1e-6


@pytest.mark.parametrize("factor", [-1.0, 2.0, 0.25, -1024.0])
def test_sign_and_powers_of_two_do_not_change_a_bit(factor: float) -> None:
    plain = edited(weights(), [project(0, 5)], 8)
    assert tensor_hash(edited(weights(), [project(0, 5, vector=factor * direction())], 8)) == tensor_hash(plain)


def test_length_of_the_direction_does_not_matter() -> None:
    for factor in (3.7, 1e-30, 1e30):
        difference = edited(weights(), [project(0, vector=factor * direction())], 8) - edited(
            weights(), [project(0)], 8
        )
        assert difference.abs().max() <= 1e-6


def test_order_of_heads_does_not_matter() -> None:
    assert project(4, 0, 2).heads == (0, 2, 4)
    assert torch.equal(edited(weights(), [project(4, 0, 2)], 8), edited(weights(), [project(2, 4, 0)], 8))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 2.0, -0.5])
def test_weight_scales_the_component(weight: float) -> None:
    v = direction().double() / direction().double().norm()
    before = v @ weights(dtype=torch.float64)
    after = v @ edited(weights(dtype=torch.float64), [project(2, weight=weight)], 8)
    torch.testing.assert_close(after[16:24], (1 - weight) * before[16:24], rtol=0, atol=1e-12)


def test_weight_zero_keeps_even_the_sign_of_zero() -> None:
    weight = weights()
    weight[3, 4] = -0.0
    assert tensor_hash(edited(weight, [project(0, weight=0.0)], 8)) == tensor_hash(weight)


@pytest.mark.parametrize("offset", range(1, 6))
def test_bytes_do_not_depend_on_alignment_or_layout(offset: int) -> None:
    weight = weights()
    operations = [project(0, 3), project(3, seed=2)]
    expected = tensor_hash(edited(weight, operations, 8))
    shifted = torch.empty(weight.numel() + offset)[offset:].view(weight.shape).copy_(weight)
    assert tensor_hash(edited(shifted, operations, 8)) == expected
    assert tensor_hash(edited(weight.t().contiguous().t(), operations, 8)) == expected


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(1536, 8 * 96, generator=torch.Generator().manual_seed(0))
    operation = project(0, 3, 7, vector=torch.randn(1536, generator=torch.Generator().manual_seed(1)))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(tensor_hash(edited(weight, [operation], 96)))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_operations_on_the_same_head_compose_in_order() -> None:
    first, second = project(2, seed=1), project(2, seed=2)
    one = edited(weights(dtype=torch.float64), [first, second], 8)
    assert torch.equal(one, edited(edited(weights(dtype=torch.float64), [first], 8), [second], 8))
    assert (one - edited(weights(dtype=torch.float64), [second, first], 8)).abs().max() > 1e-3


def test_several_heads_in_one_operation_equal_one_operation_each() -> None:
    split = [project(0), project(3), project(5)]
    assert torch.equal(edited(weights(), [project(0, 3, 5)], 8), edited(weights(), split, 8))


def test_head_width_is_counted_from_the_matrix() -> None:
    """Gotcha 2: with head_dim != hidden / heads the wrong columns would change in silence."""
    weight = weights(width=16)
    result = edited(weight, [project(1)], 16)
    changed = (result != weight).any(0).nonzero().flatten().tolist()
    assert changed == list(range(16, 32))


def test_in_place_form_gives_the_same_bytes_and_the_survival() -> None:
    weight = weights(dtype=torch.bfloat16)
    operations = [project(1, 2), project(2, seed=2)]
    expected = edited(weight, operations, 8)
    survival = edit_(weight, operations, 8)
    assert torch.equal(weight, expected)
    assert survival.share == pytest.approx(1, abs=0.01) and survival.cosine == pytest.approx(1, abs=0.01)


def test_survival_is_counted_against_numpy() -> None:
    weight = weights(dtype=torch.bfloat16)
    operations = [project(1, 2, weight=0.003)]
    wanted = naive(weight, operations, 8) - weight.double().numpy()
    stored = edited(weight, operations, 8).double().numpy() - weight.double().numpy()
    survival = edit_(weight, operations, 8)
    assert survival.wanted == pytest.approx(np.linalg.norm(wanted), rel=1e-9)
    assert survival.actual == pytest.approx(np.linalg.norm(stored), rel=1e-9)
    assert survival.cosine == pytest.approx(
        (wanted * stored).sum() / np.linalg.norm(wanted) / np.linalg.norm(stored), rel=1e-9
    )
    assert survival.cosine < 0.99  # A small change does not survive bfloat16 unharmed, and that is said.


def test_survival_of_nothing_is_unknown() -> None:
    assert Survival().share is None and Survival().cosine is None
    assert edit_(weights(), [project(0, weight=0.0)], 8) == Survival()


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 9),
    chosen=st.lists(st.tuples(st.sets(st.integers(0, HEADS - 1), min_size=1), st.floats(-2, 2), st.integers(0, 3)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_low_rank_is_the_composed_change(
    width: int, chosen: list[tuple[set[int], float, int]], dtype: torch.dtype
) -> None:
    weight = weights(width, dtype)
    operations = [project(*heads, weight=strength, seed=seed) for heads, strength, seed in chosen]
    rows, columns = low_rank(weight, operations, width)
    assert rows.shape == (len(operations), HEADS * width) and columns.shape == (OUT, len(operations))
    expected = naive(weight, operations, width) - weight.double().numpy()
    np.testing.assert_allclose(
        (columns.double() @ rows.double()).numpy(), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max())
    )


def test_blocks_are_the_touched_heads() -> None:
    blocks = list(edited_blocks(weights(), [project(4, 1), project(1, seed=3)], 8))
    assert [block.columns for block in blocks] == [slice(8, 16), slice(32, 40)]
    assert all(block.exact.dtype == torch.float64 for block in blocks)


@pytest.mark.parametrize("size", [1, 48, 150, 1 << 20])
def test_bytes_do_not_depend_on_the_size_of_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = [project(1, 4), project(4, seed=2)]
    expected = tensor_hash(edited(weights(), operations, 8))
    monkeypatch.setattr(module, "BLOCK", size)
    monkeypatch.setattr(module, "WIDTH", 1)
    assert tensor_hash(edited(weights(), operations, 8)) == expected
    assert len(list(edited_blocks(weights(), operations, 8))) == {1: 16, 48: 16, 150: 6, 1 << 20: 2}[size]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_dtypes_are_refused(dtype: torch.dtype) -> None:
    for function in (edited, edit_, low_rank):
        with pytest.raises(SteerError, match="dtype"):
            function(torch.zeros(OUT, 48).to(dtype), [project(0)], 8)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"heads": ()}, "no head"),
        ({"heads": (1, 1)}, "twice"),
        ({"heads": (-1,)}, "from 0"),
        ({"layer": -2}, "from 0"),
        ({"module": "attention_input"}, "module"),
        ({"weight": float("nan")}, "finite"),
        ({"vector": torch.zeros(OUT)}, "zero"),
        ({"vector": torch.full((OUT,), float("inf"))}, "finite"),
    ],
)
def test_senseless_operations_are_refused(change: dict[str, object], word: str) -> None:
    arguments = {"layer": 0, "module": "attention_output", "heads": (0,), "vector": direction()} | change
    with pytest.raises(SteerError, match=word):
        ProjectColumns(**arguments)  # type: ignore[arg-type]


def test_an_operation_is_checked_against_the_matrix() -> None:
    project(5).check((OUT, 48), HEADS)
    with pytest.raises(SteerError, match="heads 0 to 4"):
        project(5).check((OUT, 40), 5)
    with pytest.raises(SteerError, match="rows"):
        project(0).check((OUT + 1, 48), HEADS)


def test_the_operation_keeps_its_own_copy_of_the_vector() -> None:
    vector = direction()
    operation = project(0, vector=vector)
    vector.zero_()
    assert torch.equal(operation.vector, direction())
