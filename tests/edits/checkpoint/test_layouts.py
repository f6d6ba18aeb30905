"""Every operation on every family, on disk and in memory: the loaded result has the bytes of the patched model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer
from edits.checkpoint import pin, plan, revert
from steer.anatomy.headers import read_headers
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations import AddBias, AddDense, AddLowRank, Operation, ProjectColumns, Scale, SetSlice
from steer.patches import Patch
from tests import tiny
from tests.edits.material import contents

Folder = Callable[..., Path]
# One of each layout in the unit lane; the others repeat one of these and are held against transformers in `oracle`.
QUICK = ("llama", "gemma2", "qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "qwen3_next")
FAMILIES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.oracle) for family in tiny.FAMILIES]
WORDS = ("attention_output", "mlp_output", "expert_gate", "expert_up", "expert_down", "shared_expert_output", "router")


def anatomy_of(folder: Path) -> Anatomy:
    headers = read_headers(folder)
    return resolve(headers.config, headers.shapes)


def everything(folder: Path, seed: int = 0) -> Patch:
    """One operation of each kind in turn on matrices of every word, and on tensors by their names."""
    anatomy, headers = anatomy_of(folder), read_headers(folder)
    generator = torch.Generator().manual_seed(seed)
    found: list[Operation] = []
    for word in WORDS:
        matrices = anatomy.matrices(word)
        for number, matrix in enumerate(matrices[:: max(1, len(matrices) // 5)]):
            slot = anatomy.on_disk(matrix)
            shape = slot.shape(headers.tensors[slot.name].shape)
            found.append(one(matrix, shape, number, generator))
            if anatomy.has_bias(word, matrix.layer, matrix.expert):
                vector = torch.randn(shape[0], generator=generator)
                found.append(AddBias(matrix.layer, word, vector, 0.5, matrix.expert))
    norm = next(name for name in headers.tensors if name.endswith("input_layernorm.weight") or "layernorm" in name)
    size = headers.tensors[norm].shape[0]
    found.append(AddDense(Matrix(-1, norm), torch.randn(size, 1, generator=generator)))
    if not anatomy.tied:
        found.append(ProjectColumns(-1, "embedding", None, torch.randn(anatomy.hidden, generator=generator)))
        found.append(Scale(Matrix(-1, "head"), 0.5))
    return Patch(tuple(found))


def one(matrix: Matrix, shape: tuple[int, int], number: int, generator: torch.Generator) -> Operation:
    """An operation of the `number`-th kind."""
    out, into = shape
    kind = number % 5
    if kind == 0:
        vector = torch.randn(out, generator=generator)
        return ProjectColumns(matrix.layer, matrix.module, None, vector, 0.8, matrix.expert)
    if kind == 1:
        return AddLowRank(
            matrix, torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 0.1
        )
    if kind == 2:
        return Scale(matrix, -2.0)
    if kind == 3:
        return AddDense(matrix, torch.randn(out, into, generator=generator), 0.3)
    return SetSlice(matrix, (1, out), (0, into - 1), torch.randn(out - 1, into - 1, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_is_memory_for_every_operation(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    base = tiny_folder(family, dtype=torch.bfloat16, max_shard_size="60KB")
    change = everything(base)
    made = plan(change, base)
    done = made.apply(tmp_path / "out", keep_undo=True)
    loaded = AutoModelForCausalLM.from_pretrained(done)
    model = steer.load(base, self_check=False)
    with change.on(model):
        now = model.hf.state_dict()
        assert set(now) == set(loaded.state_dict())
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, now[name]), name
    differing = [
        name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, model.hf.state_dict()[name])
    ]
    assert len(differing) >= min(len(change.matrices), 6)
    assert contents(revert(done)) == contents(base)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_fused_experts_on_disk_are_the_experts_one_by_one(tiny_folder: Folder, tmp_path: Path, shard: str) -> None:
    """The same family saved in both layouts, one patch: the loaded models are equal, and each folder comes back."""
    apart = tiny_folder("qwen3_moe", dtype=torch.bfloat16, max_shard_size=shard)
    fused = tmp_path / "fused"
    AutoModelForCausalLM.from_pretrained(apart).save_pretrained(fused, save_original_format=False, max_shard_size=shard)
    assert any(len(entry.shape) == 3 for entry in read_headers(fused).tensors.values())
    change = Patch(tuple(each for each in everything(apart).operations if not each.matrix.raw))
    folders = []
    for base in (apart, fused):
        pinned = pin(plan(change, base))
        done = plan(pinned, base).apply(tmp_path / f"{base.name}-out", keep_undo=True)
        folders.append((AutoModelForCausalLM.from_pretrained(done).state_dict(), pinned.expects))
        assert contents(revert(done)) == contents(base)
        assert contents(revert(done, tmp_path / f"{base.name}-again", base=base)) == contents(base)
    assert folders[0][1] == folders[1][1], "a matrix has one hash in both layouts"
    for name, tensor in folders[0][0].items():
        assert torch.equal(tensor, folders[1][0][name]), name


def test_undo_keeps_only_the_experts_that_change(tiny_folder: Folder, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3_moe"))
    model.save_pretrained(fused, save_original_format=False)
    anatomy = anatomy_of(fused)
    matrix = anatomy.matrices("expert_down")[1]
    made = plan(Patch((Scale(matrix, 0.0),)), fused)
    slot = anatomy.on_disk(matrix)
    stored = read_headers(fused).tensors[slot.name].shape
    assert made.bytes_undo == 4 * stored[1] * stored[2] and made.touched[0].size == stored[0] * made.bytes_undo
    assert f"expert down 1/{len(anatomy.matrices('expert_down'))} experts" in made.coverage
    done = made.apply(tmp_path / "out", keep_undo=True)
    kept = sum(path.stat().st_size for path in (done.path / "steer" / "undo").iterdir())
    assert kept < made.bytes_undo + 400
    shutil.rmtree(fused)
    revert(done, tmp_path / "back")


def test_two_names_of_one_matrix_are_refused(tiny_folder: Folder) -> None:
    base = tiny_folder("qwen3_moe")
    name = "model.layers.0.self_attn.o_proj.weight"
    both: Sequence[Operation] = (Scale(Matrix(0, "attention_output"), 0.5), Scale(Matrix(-1, name), 0.5))
    with pytest.raises(SteerError, match="both in"):
        plan(Patch(tuple(both)), base)
