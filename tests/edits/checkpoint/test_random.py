"""Random checkpoints, random patches, random options: the file holds what memory computes, and comes back byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edits.checkpoint import pieces, plan, revert
from edits.checkpoint.folder import OURS
from steer.anatomy.headers import read_headers
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError
from steer.operations import AddDense, AddLowRank, Operation, Scale, SetSlice, edited
from steer.patches import Patch
from tests.edits.material import contents

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "U8": torch.uint8}
SHAPES = [(), (5,), (7, 4), (3, 8), (2, 3, 5), (0,), (1, 1)]
Tensors = dict[str, torch.Tensor]


@st.composite
def checkpoints(draw: st.DrawFn) -> list[Tensors]:
    """One to three shards of tensors of any dtype."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shards = []
    for shard in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from([*FLOATS, *OTHERS]), min_size=1, max_size=5))
        part = {}
        for number, kind in enumerate(kinds):
            shape = draw(st.sampled_from(SHAPES))
            part[f"s{shard}.t{number}"] = torch.randn(shape, generator=generator).mul(3).to((FLOATS | OTHERS)[kind])
        shards.append(part)
    return shards


def save(shards: list[Tensors], folder: Path) -> Path:
    """One file, or shards with an index."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown", "dtype": "bfloat16"}))
    (folder / "special.bin").write_bytes(b"carried over")
    names = {}
    for number, part in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def operations(tensors: Tensors, draw: st.DataObject) -> list[Operation]:
    """One or two operations on some of the tensors, by their names."""
    found: list[Operation] = []
    generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 1000)))
    for name in draw.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True, min_size=1)):
        matrix, (out, into) = Matrix(-1, name), Slot(name).shape(tuple(tensors[name].shape))
        for kind in draw.draw(st.lists(st.sampled_from("sldv"), min_size=1, max_size=2)):
            if kind == "s" or not out:
                found.append(Scale(matrix, 0.75))
            elif kind == "l":
                factors = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
                found.append(AddLowRank(matrix, *factors))
            elif kind == "d":
                found.append(AddDense(matrix, torch.randn(out, into, generator=generator), 0.1))
            else:
                found.append(SetSlice(matrix, (0, out), (into - 1, into), torch.ones(out, 1)))
    return found


@settings(max_examples=15, deadline=None)
@given(checkpoints(), st.integers(1, 20), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_disk_is_memory_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[Tensors],
    chunk: int,
    wide: bool,
    keep_undo: bool,
    hash_all: bool,
    data: st.DataObject,
) -> None:
    place = tmp_path_factory.getbasetemp() / "random"
    base = save(shards, place / "base")
    tensors = {name: tensor for part in shards for name, tensor in part.items()}
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS.values()}
    if not floats:
        with pytest.raises(SteerError, match="has dtype"):
            plan(Patch((Scale(Matrix(-1, next(iter(tensors))), 0.5),)), base)
        return
    change = Patch(tuple(operations(floats, data)))
    for name in ("out", "out.partial", "out-reverted"):
        shutil.rmtree(place / name, ignore_errors=True)
    original, pieces.CHUNK = pieces.CHUNK, chunk
    try:
        done = plan(change, base, dtype="float32" if wide else None).apply(
            place / "out", keep_undo=keep_undo, hash_all=hash_all
        )
        before = contents(base)
        if keep_undo:
            shutil.rmtree(base)
        assert contents(revert(done)) == before
    finally:
        pieces.CHUNK = original
    found = {name: t for path in done.path.glob("*.safetensors") for name, t in load_file(path).items()}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.float() if wide and tensor.dtype in (torch.float16, torch.bfloat16) else tensor.clone()
        acting = change.matrices.get(Matrix(-1, name), ())
        if acting:
            view = Slot(name).view(expected)
            view[...] = edited(view, acting, 0)
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert found[name].contiguous().reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)), (
            name
        )
    headers = read_headers(done.path)
    index = done.path / "model.safetensors.index.json"
    if index.exists() and wide:
        assert json.loads(index.read_text())["metadata"].get("total_size", headers.bytes) == headers.bytes
    assert (done.path / "special.bin").read_bytes() == b"carried over" and (done.path / OURS).is_dir()
