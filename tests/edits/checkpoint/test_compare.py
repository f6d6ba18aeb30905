"""Bytes of two checkpoints under patches, against a comparison with the library's own reader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edits.checkpoint import OnDisk, compare
from edits.checkpoint.compare import same_bytes
from steer.errors import SteerError
from steer.patches import Patch
from tests.edits.material import patch

Folder = Callable[..., Path]
HEADS = st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1).map(tuple), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def base(tiny_folder: Folder) -> Path:
    return tiny_folder("qwen3", dtype=torch.bfloat16)


@settings(max_examples=12, deadline=None)
@given(first=HEADS, second=HEADS, scale=st.sampled_from([0.0, 0.5, 1.0]))
def test_patches_in_a_row_are_one_patch(
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[int, tuple[int, ...]],
    second: dict[int, tuple[int, ...]],
    scale: float,
) -> None:
    """Two patches laid on a base, one of them scaled, equal the checkpoint of their joint operations."""
    one, two = patch(list(first.items()), seed=1), patch(list(second.items()), seed=2)
    joint = Patch((*one.operations, *two.scaled(scale).operations))
    done = joint.plan(base).apply(tmp_path_factory.mktemp("out") / "x")
    found = same_bytes(OnDisk(base, ((one, 1.0), (two, scale))), OnDisk(done.path))
    before, after = load_file(base / "model.safetensors"), load_file(done.path / "model.safetensors")
    assert found.equal and found.tensors == len(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(same_bytes(OnDisk(base), OnDisk(done.path)).differing) == changed


def test_added_removed_renamed_and_reshaped_tensors_differ(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for number, change in enumerate(("added", "reshaped", "cast")):
        folder = tmp_path / str(number)
        shutil.copytree(base, folder)
        other = dict(tensors)
        if change == "added":
            other["extra"] = torch.ones(2)
        elif change == "reshaped":
            other[name] = other[name].T.contiguous()
        else:
            other[name] = other[name].half()
        save_file(other, folder / "model.safetensors", {"format": "pt"})
        expected = ("extra",) if change == "added" else (name,)
        assert (
            same_bytes(OnDisk(base), OnDisk(folder)).differing
            == expected
            == same_bytes(OnDisk(folder), OnDisk(base)).differing
        )


@pytest.mark.parametrize("step", [13, 64, 1 << 24])
def test_a_difference_anywhere_in_a_tensor_is_found(
    base: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "STEP", step)
    tensors = load_file(base / "model.safetensors")
    for place in (0, 24, 47):
        folder = tmp_path / f"{place}"
        shutil.copytree(base, folder)
        other = {name: tensor.clone() for name, tensor in tensors.items()}
        other["model.norm.weight"].view(torch.int16)[place] ^= 1
        save_file(other, folder / "model.safetensors", {"format": "pt"})
        assert same_bytes(OnDisk(base), OnDisk(folder)).differing == ("model.norm.weight",)


def test_negative_zero_is_not_zero(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "x")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 0.0
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    tensors["model.norm.weight"][0] = -0.0
    save_file(tensors, tmp_path / "y" / "model.safetensors")
    assert same_bytes(OnDisk(tmp_path / "x"), OnDisk(tmp_path / "y")).differing == ("model.norm.weight",)


def test_a_patch_that_does_not_fit_is_refused(base: Path) -> None:
    with pytest.raises(SteerError, match="rows"):
        same_bytes(OnDisk(base, ((patch(hidden=47), 1.0),)), OnDisk(base))
