"""Hooks on models that accelerate spreads or offloads to memory or disk: same numbers as the model in memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload

import steer
from steer import Add, Direction, ProjectOut, SetComponent, SteerError, Steering

IDS = [[3, 14, 15, 9, 26], [8, 9, 7]]
SITES = {
    "resid_pre": None,
    "z": None,
    "attn_raw": None,
    "attn_out": None,
    "resid_mid": None,
    "mlp_out": None,
    "resid_post": None,
}


def steering():
    d = Direction(torch.randn(2, 48, generator=torch.Generator().manual_seed(1)), (1, 2), "resid_post")
    return Steering(
        (
            Add(d, "resid_post"),
            ProjectOut(d, "resid_mid"),
            SetComponent(d, "attn_out", 1.0, phase="generated"),
            ProjectOut(d, "head_out", heads=((1, 0), (2, 3))),
        )
    )


def results(model):
    with model.steered(steering()), model.capture(SITES) as acts:
        logits = model.run(IDS, [2, 1])
    ids = torch.tensor([IDS[0]])
    with model.steered(Steering(steering().interventions[:2])):
        generated = model.hf.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return logits, acts, generated


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "olmo2"])
def test_offloaded_equals_in_memory(tiny, tmp_path, family, where):
    expected = results(steer.wrap(*tiny(family)))
    hf, tokenizer = tiny(family)
    if where == "cpu":
        cpu_offload(hf, execution_device=torch.device("cpu"))
    else:
        disk_offload(hf, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert hf.model.layers[0].self_attn.o_proj.weight.device.type == "meta"
    model = steer.wrap(hf, tokenizer)
    assert model.device == torch.device("cpu")
    logits, acts, generated = results(model)
    for found, wanted in zip(logits, expected[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for site, values in acts.items():
        for layer, value in values.items():
            assert value.device.type == "cpu"
            torch.testing.assert_close(value, expected[1][site][layer], rtol=1e-6, atol=1e-6)
    assert generated.tolist() == expected[2].tolist()
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()) == 0
    assert model.parameter("attention_output", 1).device.type == "meta"


def test_load_with_a_device_map_that_offloads_to_disk(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder("llama")
    whole = steer.load(folder)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    spread = steer.load(folder, device_map=parts)
    assert spread.parameter("attention_output", 3).device.type == "meta"
    for found, wanted in zip(results(spread)[0], results(whole)[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(SteerError, match="one of them"):
        steer.load(folder, device_map=parts, device="cpu")
