"""Scaled experts in memory and on disk: against weights scaled by hand, the hook, and each other, on every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import edits
import steer
from edits.checkpoint.plan import plan
from edits.experts import expert_patch
from edits.verify import verify
from steer.errors import SteerError
from steer.interventions import Add, ProjectOut, ScaleExperts
from steer.operations import Matrix
from steer.patches import Patch
from steer.steering import Steering
from tests import tiny
from tests.edits.material import contents

Folder = Callable[..., Path]
FAMILIES = [name for name in tiny.FAMILIES if "num_experts_per_tok" in tiny.FAMILIES[name]]
EXPERTS = ((1, 2), (3, 0))
IDS = [[5, 9, 14, 22, 31, 8], [7, 7, 40]]


def logits(model: steer.SteerableModel) -> Tensor:
    return torch.cat(model.run(IDS))


def loaded(folder: Path) -> steer.SteerableModel:
    """With cloned parameters: one that maps a file at an odd address gives other last bits."""
    hf = copy.deepcopy(steer.load(folder, self_check=False).hf)
    return steer.wrap(hf, self_check=False)


def by_hand(model: steer.SteerableModel, beta: float, experts: tuple[tuple[int, int], ...] = EXPERTS) -> Any:
    """A copy whose experts are scaled without our code; transformers keeps an expert on the first axis."""
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for layer, expert in experts:
            module = hf.get_submodule(
                f"{model.anatomy.record.model.layers}.{layer}.{model.anatomy.record.experts.module}"
            )
            module.down_proj[expert] *= beta
            if hasattr(module, "down_proj_bias"):
                module.down_proj_bias[expert] *= beta
    return steer.wrap(hf, self_check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_disk_are_weights_scaled_by_hand(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    base = tiny_folder(family)
    model = loaded(base)
    patch = expert_patch(EXPERTS, 64.0, base)
    assert patch == expert_patch(reversed(EXPERTS), 64.0, model), "headers and the loaded model say the same"
    biased = family == "gpt_oss"
    assert len(patch.operations) == (4 if biased else 2)
    assert {matrix.bias for matrix in patch.matrices} == ({False, True} if biased else {False})
    wanted, plain = logits(by_hand(model, 64.0)), logits(model)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    with patch.on(model):
        assert torch.equal(logits(model), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    done = plan(patch, base).apply(tmp_path / "out")
    disk = loaded(done.path)
    assert torch.equal(logits(disk), wanted), "memory and disk come from one edit function"
    assert float((wanted - plain).abs().max()) > 1e-3
    scaled = by_hand(model, 64.0).hf.state_dict()
    assert all(torch.equal(value, scaled[name]) for name, value in disk.hf.state_dict().items()), "nothing else moved"
    assert contents(edits.revert(done, tmp_path / "back", base=base)) == contents(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_is_the_patch(tiny_folder: Folder, family: str) -> None:
    model = loaded(tiny_folder(family))
    plain = logits(model)
    for beta in (64.0, 0.25, 0.0, 1.7):
        with expert_patch(EXPERTS, beta, model).on(model):
            patched = logits(model)
        with model.steered(Steering((ScaleExperts(EXPERTS, beta),))):
            hooked = logits(model)
        if beta != 1.7:
            assert torch.equal(hooked, patched), "powers of two, and nothing at all, are exact"
        assert float((hooked - patched).abs().max()) <= 1e-5 * max(1.0, float(patched.abs().max()))
        assert float((patched - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_two_are_exact_in_16_bits_too(dtype: torch.dtype) -> None:
    for family in ("olmoe", "deepseek_v3", "gpt_oss"):
        model = steer.wrap(*tiny.build(family, dtype=dtype), self_check=False)
        for beta in (64.0, 0.25):
            with expert_patch(EXPERTS, beta, model).on(model):
                patched = logits(model)
            with model.steered(Steering((ScaleExperts(EXPERTS, beta),))):
                assert torch.equal(logits(model), patched), (family, beta)


@pytest.mark.parametrize(("family", "save"), [("qwen3_moe", True), ("qwen3_moe", False), ("mixtral", False)])
def test_experts_one_by_one_and_fused_on_disk(tiny_folder: Folder, tmp_path: Path, family: str, save: bool) -> None:
    model, tokenizer = tiny.build(family, dtype=torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base, save_original_format=save)
    tokenizer.save_pretrained(base)
    fused = any(name.endswith("experts.down_proj") for name in load_file(base / "model.safetensors"))
    assert fused is not save
    patch = expert_patch(EXPERTS, 2.0, base)
    done = plan(patch, base).apply(tmp_path / "out")
    held, wanted = loaded(done.path).hf.state_dict(), by_hand(loaded(base), 2.0).hf.state_dict()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_verify_says_that_hook_and_checkpoint_agree(tiny_folder: Folder, tmp_path: Path) -> None:
    for family in ("deepseek_v3", "gpt_oss"):
        base = tiny_folder(family, dtype=torch.bfloat16)
        done = plan(expert_patch(EXPERTS, 16.0, base), base).apply(tmp_path / family)
        steered = steer.load(base, self_check=False).with_(Steering((ScaleExperts(EXPERTS, 16.0),)))
        found = verify(steered, done.path, tokens=4)
        assert found.passed and found.bytes_equal, found
        other = verify(steered, base, tokens=4)
        assert not other.passed


def test_shares_are_the_coefficient_of_the_request(tiny_folder: Folder) -> None:
    model = loaded(tiny_folder("olmoe"))
    patch = expert_patch(EXPERTS, 5.0, model)
    with patch.on(model, 0.5):
        half = logits(model)
    with expert_patch(EXPERTS, 3.0, model).on(model):
        assert torch.equal(half, logits(model))
    assert Patch.from_steering(Steering((ScaleExperts(EXPERTS, 5.0),)).scaled(0.5), model).fingerprint == (
        expert_patch(EXPERTS, 3.0, model).fingerprint
    )


def test_what_is_added_to_experts_afterwards_is_not_scaled(tiny_folder: Folder) -> None:
    """Hooks act along the forward pass: the weights of experts first, then what all of them wrote together."""
    model = loaded(tiny_folder("gpt_oss"))
    drawn = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1))
    d, other = (steer.Direction(vectors, (0, 1, 2, 3), "resid_mid") for vectors in drawn)
    steering = Steering((Add(d, "mlp_out", 0.5), ProjectOut(other, "mlp_out", 0.7), ScaleExperts(EXPERTS, 4.0)))
    with Patch.from_steering(steering, model).on(model):
        patched = logits(model)
    with model.steered(steering):
        hooked = logits(model)
    assert float((hooked - patched).abs().max()) <= 1e-5 * max(1.0, float(patched.abs().max()))


def test_the_story_of_a_patch(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("olmoe")
    patch = expert_patch(EXPERTS, 64.0, base)
    assert patch.provenance["options"] == {"beta": 64.0, "experts": [[1, 2], [3, 0]]}
    assert patch.provenance["parents"] == [Steering((ScaleExperts(EXPERTS, 64.0),)).fingerprint]
    assert patch.model is not None and patch.model.family == "olmoe"
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors") == patch
    assert edits.expert_patch is expert_patch
    assert set(patch.matrices) == {Matrix(layer, "expert_down", expert) for layer, expert in EXPERTS}


WRONG = [
    ("olmoe", EXPERTS, 1.0, "eta is 1, which leaves"),
    ("olmoe", EXPERTS, -2.0, "at least 0"),
    ("olmoe", (), 2.0, "names no expert"),
    ("olmoe", ((1, 4),), 2.0, "experts 0 to 3"),
    ("llama", EXPERTS, 2.0, "dense"),
    ("qwen3_moe", ((0, 1),), 2.0, "layers with experts: 1, 3"),
]


@pytest.mark.parametrize(("family", "experts", "beta", "words"), WRONG)
def test_what_is_refused(
    tiny_folder: Folder, family: str, experts: tuple[tuple[int, int], ...], beta: float, words: str
) -> None:
    with pytest.raises(SteerError, match=words):
        expert_patch(experts, beta, tiny_folder(family))
