"""Checkpoints that descend from one model, adapters for them, and naive arithmetic in numpy: shared by these tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import tiny

RELATED = ("base", "plus", "minus", "other", "third")


def related(
    root: Path, family: str, *, dtype=torch.float32, shards: str = "5GB", spread=0.02, names=RELATED, **options
):
    """Save models that differ from one another by `spread` of each tensor's own size; return their folders by name."""
    found = {}
    for index, name in enumerate(names):
        model, tokenizer = tiny.build(family, dtype=torch.float32, **options)
        generator = torch.Generator().manual_seed(100 + index)
        with torch.no_grad():
            for _, value in sorted(model.named_parameters()):
                value += spread * value.std().nan_to_num(0.1) * torch.randn(value.shape, generator=generator)
        found[name] = root / name
        model.to(dtype).save_pretrained(found[name], max_shard_size=shards)
        tokenizer.save_pretrained(found[name])
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by safetensors."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def wide(folder: Path) -> dict[str, np.ndarray]:
    """The same in numpy float64."""
    return {name: value.double().numpy() for name, value in tensors(folder).items()}


def resharded(folder: Path, out: Path, pieces: int) -> Path:
    """Copy a single-file checkpoint into shards, tensors dealt out in turn."""
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    found, table = tensors(folder), {}
    for index in range(pieces):
        file = f"model-{index + 1:05}-of-{pieces:05}.safetensors"
        mine = {name: found[name] for name in sorted(found)[index::pieces]}
        save_file(mine, out / file, {"format": "pt"})
        table |= dict.fromkeys(mine, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return out


def adapter(
    folder: Path, base: Path, targets: list[str], *, rank=3, alpha=6, seed=0, **config
) -> dict[str, np.ndarray]:
    """Write an adapter by hand, as PEFT stores it; return (alpha / rank) B A by the name of its tensor, in float64."""
    generator = torch.Generator().manual_seed(seed)
    stored, products = {}, {}
    for name, value in sorted(tensors(base).items()):
        if value.ndim == 2 and any(name.endswith(f"{target}.weight") for target in targets):
            A = torch.randn(rank, value.shape[1], generator=generator) * 0.1
            B = torch.randn(value.shape[0], rank, generator=generator) * 0.1
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            stored |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
            products[name] = (alpha / rank) * (B.double().numpy() @ A.double().numpy())
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets,
        "bias": "none", "use_rslora": False, "use_dora": False, "base_model_name_or_path": str(base), **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return products


def change_config(folder: Path, **values: object) -> None:
    """Set keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
