"""A steering baked into a checkpoint: what transformers loads from disk does what the hooks do, new biases and heads included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer.directions import Direction
from steer.interventions import Add, Intervention, ProjectOut
from steer.patches import Patch
from steer.steering import Steering

Folder = Callable[..., Path]
IDS = [[5, 9, 14, 22, 31, 8], [7, 7, 40]]


def v(seed: int = 0) -> Direction:
    return Direction(torch.randn(4, 48, generator=torch.Generator().manual_seed(seed)), (0, 1, 2, 3), "resid_mid")


def both() -> tuple[Intervention, ...]:
    return Add(v(), "attn_raw", 0.4), ProjectOut(v(1), "attn_out", 0.7)


CASES: dict[str, tuple[str, dict[str, Any], tuple[Intervention, ...], dict[str, Any]]] = {
    "a bias that is there": ("llama", {}, (Add(v(), "mlp_out", 0.4), ProjectOut(v(1), "mlp_out")), {}),
    "a new bias": ("qwen3", {}, both(), {"attention_bias": True}),
    "new biases behind a multiplier": ("granite", {}, (Add(v(), "attn_out", 0.4), Add(v(1), "resid_post", 0.2)), {"attention_bias": True, "mlp_bias": True}),
    "a new bias before a norm": ("gemma2", {}, (Add(v(), "attn_raw", 0.4),), {"attention_bias": True}),
    "experts": ("qwen3_moe", {}, (ProjectOut(v(), "mlp_out", 0.7),), {}),
    "experts with biases, turned round": ("gpt_oss", {}, (Add(v(), "mlp_out", 0.4), ProjectOut(v(1), "mlp_out")), {}),
    "every writer": ("qwen3", {}, (ProjectOut(v(), "resid_pre", layers=(0,)), ProjectOut(v(), "attn_out"), ProjectOut(v(), "mlp_out")), {}),
    "an untied embedding": ("qwen2", {"untie": True}, (ProjectOut(v(), "resid_pre", layers=(0,)),), {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_from_disk_does_what_the_hooks_do(tiny_folder: Folder, tmp_path: Path, name: str) -> None:
    family, options, interventions, settings = CASES[name]
    base = tiny_folder(family)
    model, steering = steer.load(base, self_check=False), Steering(interventions)
    patch = Patch.from_steering(steering, base, **options)
    assert patch == Patch.from_steering(steering, model, **options), "headers and the loaded model say the same"
    patch.plan(base, **options).apply(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in settings} == settings
    baked = steer.load(tmp_path / "out", self_check=False)
    hook, disk, plain = (torch.cat(each.run(IDS)) for each in (model.with_(steering), baked, model))
    scale = float(plain.abs().max())
    assert float((hook - disk).abs().max()) <= 2e-6 * max(1.0, scale)
    assert float((hook - plain).abs().max()) > 1e-2
    if "untie" not in options:
        memory = torch.cat(model.with_(patch).run(IDS))
        assert torch.equal(memory, disk), "memory and disk come from one edit function"
