"""The bytes of one stored tensor: streamed in pieces = edited whole = numpy in float64, for every layout and operation."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edits.checkpoint import pieces
from edits.checkpoint.pieces import Editing, edited_bytes
from edits.checkpoint.touched import SlotEdit, Touched
from steer.anatomy.headers import read_file_header
from steer.anatomy.slots import Matrix, Slot
from steer.operations import AddDense, AddLowRank, Operation, ProjectColumns, Scale, SetSlice

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
E, OUT, IN = 3, 10, 6
# name -> (shape as stored, slots of its matrices)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Slot, ...]]] = {
    "plain": ((OUT, IN), (Slot("t"),)),
    "embedding": ((OUT, IN), (Slot("t", transposed=True),)),
    "vector": ((OUT,), (Slot("t"),)),
    "number": ((), (Slot("t"),)),
    "convolution": ((OUT, 2, 3), (Slot("t"),)),
    "fused": ((E, OUT, IN), (Slot("t", 0), Slot("t", 2))),
    "fused and turned": ((E, IN, OUT), (Slot("t", 1, True), Slot("t", 2, True))),
    "halves": ((E, 2 * OUT, IN), (Slot("t", 1, rows=(0, OUT, 1)), Slot("t", 1, rows=(OUT, 2 * OUT, 1)), Slot("t", 2, rows=(0, OUT, 1)))),
    "interleaved": ((E, IN, 2 * OUT), (Slot("t", 0, True, (1, None, 2)), Slot("t", 0, True, (0, None, 2)))),
    "interleaved rows": ((2 * OUT, IN), (Slot("t", rows=(1, None, 2)),)),
    "fused biases": ((E, 2 * OUT), (Slot("t", 1, rows=(1, None, 2)), Slot("t", 0, rows=(0, None, 2)))),
}  # fmt: skip


def numpy_view(slot: Slot, stored: np.ndarray) -> np.ndarray:
    """The matrix in a stored array, written out case by case and not with `Slot.view`."""
    found = stored if slot.expert is None else stored[slot.expert]
    if found.ndim <= 1:
        found = found.reshape(-1, 1)
    elif found.ndim == 3:
        found = found.reshape(found.shape[0], -1)
    elif slot.transposed:
        found = found.transpose(1, 0)
    if slot.rows is not None:
        begin, stop, step = slot.rows
        found = found[begin : found.shape[0] if stop is None else stop : step]
    return found


def operation(kind: str, number: int, shape: tuple[int, int], generator: torch.Generator) -> Operation:
    """An operation on the matrix `Matrix(number, "mlp_output")` of this shape."""
    matrix, (out, into) = Matrix(number, "mlp_output"), shape
    if kind == "project":
        return ProjectColumns(number, "mlp_output", None, torch.randn(out, generator=generator) + 0.1, 0.7)
    if kind == "scale":
        return Scale(matrix, -1.5, weight=0.5)
    if kind == "low rank":
        return AddLowRank(
            matrix, torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 0.3
        )
    if kind == "dense":
        return AddDense(matrix, torch.randn(out, into, generator=generator), 1.25)
    rows, columns = (out // 2, out), (0, max(1, into - 1))
    size = (rows[1] - rows[0], columns[1] - columns[0])
    return SetSlice(matrix, rows, columns, torch.randn(size, generator=generator))


def numpy_result(each: Any, w: np.ndarray) -> np.ndarray:
    """The formula in float64, straight from the docs."""
    if isinstance(each, ProjectColumns):
        v = each.vector.double().numpy()
        v = v / np.sqrt((v * v).sum())
        return w - each.weight * np.outer(v, v @ w)
    if isinstance(each, Scale):
        return w * (1 + each.weight * (each.factor - 1))
    if isinstance(each, AddLowRank):
        return w + each.weight * (each.B.double().numpy() @ each.A.double().numpy())
    if isinstance(each, AddDense):
        return w + each.weight * each.delta.double().numpy()  # type: ignore[union-attr]
    w = w.copy()
    w[each.rows[0] : each.rows[1], each.columns[0] : each.columns[1]] = each.values.double().numpy()
    return w


def case(
    folder: Path, layout: str, dtype: str, kinds: list[str], seed: int, out: str | None = None
) -> tuple[Touched, torch.Tensor]:
    """A stored tensor, and what is to be done to it."""
    shape, slots = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    folder.mkdir(exist_ok=True)
    save_file({"before": torch.zeros(3), "t": stored, "z": torch.zeros(1)}, folder / "model.safetensors")
    edits = []
    for number, slot in enumerate(slots):
        size = slot.shape(shape)
        usable = [kind for kind in kinds if kind != "set" or size[0] > 1]
        edits.append(
            SlotEdit(
                Matrix(number, "mlp_output"), slot, tuple(operation(k, number, size, generator) for k in usable), 0
            )
        )
    entry = read_file_header(folder / "model.safetensors")["t"]
    return Touched("t", "model.safetensors", out or dtype, shape, entry, tuple(edits)), stored


KINDS = st.lists(st.sampled_from(["project", "scale", "low rank", "dense", "set"]), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(list(DTYPES)),
    KINDS,
    st.integers(1, 40),
    st.integers(0, 99),
    st.booleans(),
)
def test_pieces_of_any_size_are_the_tensor_that_numpy_makes(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    dtype: str,
    kinds: list[str],
    chunk: int,
    seed: int,
    wide: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "pieces"
    out = "F32" if wide else dtype
    tensor, stored = case(folder, layout, dtype, kinds, seed, out)
    original, pieces.CHUNK = pieces.CHUNK, chunk
    try:
        editing = Editing(folder, tensor)
        streamed = b"".join(piece.tobytes() for piece in editing.pieces())
    finally:
        pieces.CHUNK = original
    assert streamed == b"".join(piece.tobytes() for piece in edited_bytes(folder, tensor))
    expected = stored.double().numpy().copy()
    for edit in tensor.edits:
        view = numpy_view(edit.slot, expected)
        result = view
        for each in edit.operations:
            result = numpy_result(each, result)
        view[...] = result
    exact = torch.from_numpy(expected)
    found = torch.frombuffer(bytearray(streamed), dtype=DTYPES[out]).reshape(stored.shape)
    # numpy sums a product in another order: a number on the edge between two may fall to the other side.
    step = exact.abs() * torch.finfo(DTYPES[out]).eps + 1e-6
    assert bool(((found.double() - exact).abs() <= step).all())
    same = (found == exact.to(DTYPES[out])).double().mean()
    assert float(same) > 0.95
    record = editing.record()
    assert record["after"] == "sha256:" + hashlib.sha256(streamed).hexdigest()
    assert (
        record["before"]
        == "sha256:" + hashlib.sha256(stored.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    )
    change = exact - stored.double()
    assert record["wanted"] == pytest.approx(float(change.norm()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", ["project", "scale", "set"])
def test_boxes_cover_whatever_changes(tmp_path: Path, layout: str, kind: str) -> None:
    """What lies outside of the boxes has its bytes; where a part is set, the boxes are no larger than they need be."""
    tensor, stored = case(tmp_path, layout, "BF16", [kind], 3)
    found = torch.frombuffer(
        bytearray(b"".join(p.tobytes() for p in edited_bytes(tmp_path, tensor))), dtype=torch.bfloat16
    )
    changed = (found.reshape(tensor.axes) != stored.reshape(tensor.axes)).numpy()
    covered = np.zeros(tensor.axes, dtype=bool)
    for e0, e1, r0, r1, c0, c1 in tensor.boxes:
        covered[e0:e1, r0:r1, c0:c1] = True
    assert changed.any() or kind == "set"
    assert not (changed & ~covered).any()
    if layout in ("plain", "fused", "embedding", "fused and turned") and kind == "set":
        assert changed.sum() > 0.9 * covered.sum()


def test_memory_follows_the_piece_and_not_the_tensor(tmp_path: Path) -> None:
    """Spans cover every row once; only a projection asks for a whole matrix, and then for one expert at a time."""
    shape = (4, 600, 1000)
    for kind, layout in (("scale", False), ("project", False), ("project", True)):
        slot = Slot("t", 1, layout)
        size = slot.shape(shape)
        each = operation(kind, 0, size, torch.Generator().manual_seed(0))
        tensor = Touched("t", "f", "BF16", shape, None, (SlotEdit(Matrix(0, "mlp_output"), slot, (each,), 0),))
        spans = list(pieces.spans(tensor))
        assert [(s.expert, row) for s in spans for row in range(s.start, s.stop)] == [
            (e, r) for e in range(4) for r in range(600)
        ]
        whole = [s for s in spans if (s.stop - s.start) * 1000 > pieces.CHUNK]
        assert [(s.expert, s.start, s.stop) for s in whole] == (
            [(1, 0, 600)] if kind == "project" and not layout else []
        )


def test_a_tensor_that_is_not_there_begins_as_zeros(tmp_path: Path) -> None:
    vector = torch.randn(7)
    edit = SlotEdit(Matrix(0, "mlp_output"), Slot("b"), (AddDense(Matrix(0, "mlp_output"), vector[:, None]),), 0)
    tensor = Touched("b", "model.safetensors", "BF16", (7,), None, (edit,), "zeros")
    editing = Editing(tmp_path, tensor)
    data = b"".join(piece.tobytes() for piece in editing.pieces())
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16), vector.bfloat16())
    assert editing.record()["before"] is None and tensor.boxes == ()
    assert editing.record()["wanted"] == pytest.approx(math.sqrt(float((vector.double() ** 2).sum())))
