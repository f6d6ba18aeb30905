"""Experts in MXFP4 scaled by a power of two in their block exponents, against what transformers makes of the bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import steer
from edits.checkpoint.apply import Edited, pin
from edits.checkpoint.plan import plan
from edits.checkpoint.proof import prove
from edits.checkpoint.revert import revert
from edits.verify import verify
from steer.coverage import coverage
from steer.errors import SteerError
from steer.interventions import Add, ProjectOut, ScaleExperts
from steer.operations import Matrix, Scale
from steer.patches import Patch
from steer.steering import Steering
from tests.edits.material import contents

Folder = Callable[..., Path]
IDS = [[5, 9, 14, 22, 31, 8], [7, 7, 40]]
DOWN = "model.layers.{}.mlp.experts.down_proj{}"
EXPERTS = ((1, 2), (3, 0))


@pytest.fixture(scope="module")
def packed(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt_oss whose experts are random MXFP4, as openai/gpt-oss-20b stores them."""
    base = tmp_path_factory.mktemp("mxfp4") / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    shutil.copytree(tiny_folder("gpt_oss", dtype=torch.bfloat16, **sizes), base)
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(torch.uint8)

    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        experts, inputs, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = drawn(0, 256, experts, out, inputs // 32, 16)
        weights[f"{name}_scales"] = drawn(120, 125, experts, out, inputs // 32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    (base / "config.json").write_text(json.dumps(config))
    return base


def patch(base: Path, beta: float, experts: tuple[tuple[int, int], ...] = EXPERTS) -> Patch:
    return Patch.from_steering(Steering((ScaleExperts(experts, beta),)), base)


def numbers(folder: Path, layer: int) -> Tensor:
    """The plain numbers, by transformers' own conversion."""
    held = load_file(folder / "model.safetensors")
    return convert_moe_packed_tensors(held[DOWN.format(layer, "_blocks")], held[DOWN.format(layer, "_scales")])


def wide(folder: Path) -> steer.SteerableModel:
    hf = steer.load(folder, self_check=False, device="cpu").hf.float()
    hf.set_experts_implementation("eager")
    return steer.wrap(hf, self_check=False)


@pytest.mark.parametrize("beta", [64.0, 0.25])
def test_the_plain_numbers_are_exactly_beta_times(packed: Path, tmp_path: Path, beta: float) -> None:
    planned = plan(patch(packed, beta), packed)
    assert planned.coverage == "expert down 2/16 experts; 2 output biases"
    done = planned.apply(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, done.path))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        DOWN.format(layer, ending) for layer in (1, 3) for ending in ("_scales", "_bias")
    }
    for layer in range(4):
        factors = torch.ones(4)
        for at, expert in EXPERTS:
            factors[expert] = beta if at == layer else factors[expert]
        assert torch.equal(numbers(done.path, layer), numbers(packed, layer) * factors[:, None, None].bfloat16())
        bias = before[DOWN.format(layer, "_bias")]
        assert torch.equal(after[DOWN.format(layer, "_bias")], bias * factors[:, None].to(bias.dtype))
    assert done.survived == 1.0


def test_it_is_undone_and_proved_like_any_other_edit(packed: Path, tmp_path: Path) -> None:
    made = pin(plan(patch(packed, 4.0), packed))
    done = plan(made, packed).apply(tmp_path / "out", keep_undo=True)
    assert contents(revert(done, tmp_path / "back")) == contents(packed)
    assert contents(revert(done, tmp_path / "from base", base=packed)) == contents(packed)
    proof = prove(done.path)
    assert proof.passed, proof
    other = plan(patch(packed, 2.0), packed).apply(tmp_path / "other")
    with pytest.raises(SteerError, match="which the patch was made for"):
        plan(made, other.path).apply(tmp_path / "again")


def test_what_transformers_loads_does_what_the_factors_say(packed: Path, tmp_path: Path) -> None:
    done: Edited = plan(patch(packed, 8.0), packed).apply(tmp_path / "out")
    loaded, base = wide(done.path), wide(packed)
    plain = torch.cat(base.run(IDS))
    with torch.no_grad():
        for layer, expert in EXPERTS:
            experts = base.hf.get_submodule(f"model.layers.{layer}.mlp.experts")
            experts.down_proj[expert] *= 8.0
            experts.down_proj_bias[expert] *= 8.0
    by_hand = torch.cat(base.run(IDS))
    assert torch.equal(torch.cat(loaded.run(IDS)), by_hand)
    assert float((by_hand - plain).abs().max()) > 1e-2


def test_verify_says_that_the_hook_and_the_exponents_agree(packed: Path, tmp_path: Path) -> None:
    done = plan(patch(packed, 16.0), packed).apply(tmp_path / "out")
    steered = steer.load(packed, self_check=False, device="cpu").with_(Steering((ScaleExperts(EXPERTS, 16.0),)))
    found = verify(steered, done.path, tokens=4)
    assert found.passed and found.bytes_equal, found
    assert not verify(steered, packed, tokens=4).passed


@pytest.mark.parametrize("beta", [3.0, 0.0, 0.75])
def test_other_factors_are_refused_before_anything_is_written(packed: Path, beta: float) -> None:
    with pytest.raises(SteerError, match=f"the factor {beta:g} is none.*power of two such as.*dequantise"):
        plan(patch(packed, beta), packed)
    found = coverage(Steering((ScaleExperts(EXPERTS, beta),)), packed, "patch")
    assert not found.ok and "the factor" in str(found)
    assert not coverage(patch(packed, beta), packed, "patch").ok


@pytest.mark.parametrize(("fits", "beta"), [(2.0**130, 2.0**131), (2.0**-120, 2.0**-121)])
def test_exponents_that_leave_their_range_are_refused(packed: Path, tmp_path: Path, fits: float, beta: float) -> None:
    """Here they lie between 120 and 124."""
    down = Matrix(1, "expert_down", 2)
    done = plan(Patch((Scale(down, fits),)), packed).apply(tmp_path / "fits")
    shifted = load_file(done.path / "model.safetensors")[DOWN.format(1, "_scales")][2]
    assert int(shifted.max() if fits > 1 else shifted.min()) == (254 if fits > 1 else 0)
    with pytest.raises(SteerError, match=r"block exponents of layer 1, expert 2, expert_down out of.*0 to 254"):
        plan(Patch((Scale(down, beta),)), packed).apply(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_exponent_but_255_is_shifted_exactly() -> None:
    from steer.operations import edited
    from steer.operations.exponents import DTYPE

    for shift in (-3, 0, 1, 100):
        inside = torch.arange(max(0, -shift), 255 - max(0, shift), dtype=torch.uint8)[None]
        shifted = edited(inside.view(DTYPE), [Scale(Matrix(0, "expert_down", 0), 2.0**shift)], 1).view(torch.uint8)
        assert torch.equal(shifted.int(), inside.int() + shift)
        for outside in (torch.tensor([[255]], dtype=torch.uint8), inside.flip(1)[:, :1] + 1, inside[:, :1] - 1):
            wrong = int(outside) + shift not in range(255) or int(outside) == 255
            if wrong:
                with pytest.raises(SteerError, match="out of their range"):
                    edited(outside.view(DTYPE), [Scale(Matrix(0, "expert_down", 0), 2.0**shift)], 1)


def test_coverage_on_a_checkpoint_in_mxfp4(packed: Path) -> None:
    steering = Steering((ScaleExperts(EXPERTS, 64.0),))
    for change in (steering, patch(packed, 64.0)):
        assert coverage(change, packed, "patch").ok, str(coverage(change, packed, "patch"))
    assert "experts 2 of 4x4, weight and bias" in str(coverage(steering, packed, "patch"))
    assert coverage(steering, packed, "hook").ok
    d = steer.Direction(torch.ones(4, 64), (0, 1, 2, 3), "resid_mid")
    for other in (Add(d, "mlp_out"), ProjectOut(d, "mlp_out")):
        assert "quantised (mxfp4)" in str(coverage(Steering((other,)), packed, "patch"))


def test_other_quantised_experts_are_refused_with_the_remedy(tiny_folder: Folder, tmp_path: Path) -> None:
    for method, pack in PACKED.items():
        base = tmp_path / method
        shutil.copytree(tiny_folder("qwen3_moe", dtype=torch.bfloat16), base)
        weights = load_file(base / "model.safetensors")
        for name in [name for name in weights if ".experts." in name]:
            weights |= pack(name.removesuffix(".weight"), weights.pop(name))
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(SteerError, match=f"quantised on disk .{method}.*ScaleExperts"):
            plan(Patch((Scale(Matrix(1, "expert_down", 0), 2.0),)), base)


def _eight_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.ones(1, 1)}


def _gptq(name: str, weight: Tensor) -> dict[str, Tensor]:
    out, into = weight.shape
    held = {"qweight": torch.zeros(into // 8, out), "qzeros": torch.zeros(1, out // 8), "g_idx": torch.zeros(into)}
    return {f"{name}.{key}": value.int() for key, value in held.items()} | {f"{name}.scales": torch.ones(1, out)}


def _awq(name: str, weight: Tensor) -> dict[str, Tensor]:
    out, into = weight.shape
    held = {"qweight": torch.zeros(into, out // 8), "qzeros": torch.zeros(1, out // 8)}
    return {f"{name}.{key}": value.int() for key, value in held.items()} | {f"{name}.scales": torch.ones(1, out)}


def _bitsandbytes(name: str, weight: Tensor) -> dict[str, Tensor]:
    flat = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {f"{name}.weight": flat, f"{name}.weight.absmax": torch.ones(weight.numel() // 64)}


PACKED = {"fp8": _eight_bits, "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes}
