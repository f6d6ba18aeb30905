"""Adapter folders written by hand, and the same arithmetic done naively, for the tests of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "bias": "none",
    "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True,
    "base_model_name_or_path": "somewhere", "target_modules": ["o_proj"], "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
O_PROJ = "model.layers.{}.self_attn.o_proj"


def factors(out: int, into: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random A (rank, in) and B (out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator) / into


def write(folder: Path, targets: Mapping[str, tuple[Tensor, Tensor]], **settings: object) -> Path:
    """Write an adapter whose `targets` are named by module, such as "model.layers.0.self_attn.o_proj"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    tensors = {}
    for name, (A, B) in targets.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def attention(folder: Path, layers: tuple[int, ...] = (0, 2), **settings: object) -> Path:
    """Write an adapter of attention output projections (48, 64) with rank 2."""
    return write(folder, {O_PROJ.format(layer): factors(48, 64, 2, layer) for layer in layers}, **settings)
