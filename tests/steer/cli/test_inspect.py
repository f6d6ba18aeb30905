"""`steer inspect`: what it prints agrees with the model, and it stays light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import steer
from steer import Add, Direction, ProjectOut, ScaleExperts, Steering
from steer.anatomy import read_headers
from steer.anatomy.record import FAMILIES
from steer.cli.app import run
from tests.steer import lora
from tests.tiny import FAMILIES as TINY

TWO_KINDS = (
    "gemma4_text",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)  # Heads of this width on layers 0 and 2, or 1 and 3.


def inspected(capsys, *arguments):
    status = run(["inspect", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", TINY)
def test_the_numbers_are_the_models(tiny_folder, capsys, family):
    folder = tiny_folder(family)
    status, found = inspected(capsys, folder, "--self-check")
    model = steer.load(folder)
    assert status == 0
    assert found["identity"] == model.identity.to_dict()
    assert {name: found[name] for name in model.anatomy.numbers()} == model.anatomy.numbers()
    assert found["attention_contribution"]["kind"] == model.anatomy.attention_contribution.kind
    assert found["sites"] == {site: len(model.anatomy.site_layers(site)) for site in found["sites"]}
    assert found["sites"]["attn_out"] == found["sites"]["mlp_out"] == found["sites"]["resid_mid"] == 4
    assert found["sites"]["z"] == (2 if family in TWO_KINDS else 4)
    assert found["experts"] == model.anatomy.experts == (4 if model.anatomy.expert_layers else 0)
    assert (
        found["self_check"]["layers"] == 4
        and max(found["self_check"]["differences"].values()) <= found["self_check"]["tolerance"]
    )


def test_it_reads_well(tiny_folder, capsys):
    assert run(["inspect", str(tiny_folder("granite"))]) == 0
    text = capsys.readouterr().out
    for part in (
        "granite",
        "head_width 12",
        "times 0.22",
        "mlp_raw 4/4",
        "ProjectOut at head_out",
        "ProjectOut at mlp_out",
        "shape_id",
    ):
        assert part in text
    assert run(["inspect", str(tiny_folder("gemma2"))]) == 0
    assert "through the norm post_attention_layernorm" in capsys.readouterr().out
    assert run(["inspect", str(tiny_folder("qwen3_moe"))]) == 0
    text = capsys.readouterr().out
    for part in (
        "mlp_raw 2/4",
        "4 experts on each of 2 layers (1, 3), 2 chosen for a token",
        "ScaleExperts at router",
        "expert_down 8",
        "router 2",
    ):
        assert part in text
    assert run(["inspect", str(tiny_folder("gpt_oss"))]) == 0
    assert "expert_down 16 in 4 fused tensors" in capsys.readouterr().out
    assert run(["inspect", str(tiny_folder("qwen3_5_text"))]) == 0
    assert "linear attention, without heads, on 2 layers" in capsys.readouterr().out
    assert run(["inspect", str(tiny_folder("qwen2"))]) == 0
    assert "head the embedding" in capsys.readouterr().out


def test_the_coverage_of_a_change(tiny_folder, tmp_path, capsys):
    d = Direction(torch.ones(1, 48), (1,), "resid_mid")
    path = Steering((Add(d, "attn_out"), ProjectOut(d, "head_out", heads=((1, 0),)))).save(tmp_path / "both.yaml")
    status, found = inspected(capsys, f"{tiny_folder('qwen3')}+{path}")
    assert status == 0
    by_form = {each["form"]: each for each in found["changes"][0]["coverage"]}
    assert [by_form[form]["ok"] for form in ("hook", "patch", "lora")] == [True, True, False] and set(by_form) == {
        "hook",
        "vllm",
        "patch",
        "lora",
    }
    assert run(["inspect", f"{tiny_folder('qwen3')}+{path}"]) == 0
    assert "hook form, 2 of 2 parts" in capsys.readouterr().out


def test_scaled_experts_and_what_packs_them(tiny_folder, tmp_path, capsys):
    path = Steering((ScaleExperts(((1, 2), (3, 0)), 64.0),)).save(tmp_path / "up.yaml")
    status, found = inspected(capsys, f"{tiny_folder('qwen3_moe')}+{path}")
    assert status == 0
    assert {each["form"]: each["ok"] for each in found["changes"][0]["coverage"]} == {
        "hook": True, "vllm": True, "patch": True, "lora": False,
    }  # fmt: skip
    base = tmp_path / "packed"
    base.mkdir()
    shapes = dict(read_headers(tiny_folder("gpt_oss")).shapes)
    for name in [name for name in shapes if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        experts, inputs, out = shapes.pop(name)
        shapes |= {f"{name}_blocks": (experts, out, inputs // 32 or 1, 16), f"{name}_scales": (experts, out, 1)}
    words = {True: torch.uint8, False: torch.bfloat16}
    tensors = {
        key: torch.zeros(shape, dtype=words[key.endswith(("_blocks", "_scales"))]) for key, shape in shapes.items()
    }
    save_file(tensors, base / "model.safetensors")
    config = json.loads((tiny_folder("gpt_oss") / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    status, found = inspected(capsys, base)
    told = {row["form"]: row for row in found["coverage"] if row["change"] == "ScaleExperts at router"}
    assert (told["patch"]["layers"], told["patch"]["why"]) == (4, "powers of two only (mxfp4)")
    assert (told["lora"]["layers"], told["hook"]["layers"]) == (0, 4)


def test_an_adapter_of_fused_experts_is_read_with_the_model(tiny_folder, tmp_path, capsys):
    """Which rows are gate and which are up is the family's, so the model is needed to read it."""
    shape = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    made = lora.factors(2 * 24, 48, 2 * 4)
    pair = {"model.layers.1.mlp.experts": (made[0], made[1])}
    folder = lora.write(tmp_path / "a", pair, **shape)
    status, found = inspected(capsys, f"{tiny_folder('qwen3_moe')}+{folder}")
    assert status == 0, found
    rows = {each["form"]: each["rows"] for each in found["changes"][0]["coverage"]}
    assert len(rows["patch"]) == 2 and all("expert" in row["what"] for row in rows["patch"])
    record = FAMILIES / "qwen3_moe.yaml"
    status, found = inspected(capsys, f"{tiny_folder('qwen3_moe')}+{folder}", "--anatomy", record)
    assert status == 2 and "steer apply" in found["error"]["remedy"], "not counted by another record without a word"


def test_an_unknown_family_and_the_users_record(tiny_folder, tmp_path, capsys):
    source, folder = tiny_folder("llama"), tmp_path / "novel"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"model_type": "novel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    status, found = inspected(capsys, folder)
    assert (
        status == 2
        and "model.layers.0.self_attn.o_proj.weight" in found["error"]["message"]
        and "anatomy=FILE" in found["error"]["remedy"]
    )
    record = tmp_path / "novel.yaml"
    record.write_text(
        (FAMILIES / "llama.yaml").read_text().replace("family: llama", "family: novel").replace("[llama]", "[novel]")
    )
    status, found = inspected(capsys, folder, "--anatomy", record)
    assert status == 0 and found["family"] == "novel"


@pytest.mark.parametrize("name", ["organism:nobody", "./nowhere"])
def test_bad_names_exit_with_two(capsys, name):
    assert run(["inspect", name]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("steer: ") and captured.err.count("\n") == 1 and not captured.out


def test_400_tensors_take_no_torch(tiny_folder, tmp_path):
    """What keeps it under a second; how long it takes is measured in benchmarks, never in a test."""
    config = json.loads((tiny_folder("llama", attention_bias=False, mlp_bias=False) / "config.json").read_text())
    layers, tensors = 44, {}
    for layer in range(layers):
        for name, shape in {
            "self_attn.o_proj": (48, 48),
            "mlp.down_proj": (48, 64),
            "input_layernorm": (48,),
            "post_attention_layernorm": (48,),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.zeros(shape)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.zeros(2, 48)
    tensors |= {
        "model.embed_tokens.weight": torch.zeros(60, 48),
        "lm_head.weight": torch.zeros(60, 48),
        "model.norm.weight": torch.zeros(48),
    }
    assert len(tensors) >= 399
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    code = "import sys; from steer.cli.app import run; run(['inspect', sys.argv[1], '--json']); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tensors"] == len(tensors)
