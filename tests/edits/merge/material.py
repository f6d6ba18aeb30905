"""Families of tiny checkpoints that a merge can take: a base and models near it, laid out in different ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

Folder = Callable[..., Path]


def near(tensors: Mapping[str, Tensor], seed: int, spread: float = 0.1) -> dict[str, Tensor]:
    """Return tensors with noise of a tenth of their spread added, in their dtype."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors.items():
        exact = tensor.float()
        noise = torch.randn(tensor.shape, generator=generator)
        found[name] = (exact + spread * exact.std().nan_to_num(0.1) * noise).to(tensor.dtype)
    return found


def save(folder: Path, tensors: Mapping[str, Tensor], like: Path, shards: int = 1, **config: Any) -> Path:
    """Write a checkpoint with the small files of another; `config` changes keys of config.json."""
    folder.mkdir(parents=True)
    for path in like.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copy(path, folder / path.name)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config, indent=2))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    table = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(held, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(held, file)
    sizes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": sizes}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def family(root: Path, name: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **options: Any) -> dict[str, Path]:
    """Write `base` (one file), `one` (three shards) and `two` (one file); experts of a layer in one tensor each."""
    model, tokenizer = tiny.build(name, dtype=dtype, **options)
    plain = root / "plain"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    found = {"base": save(root / "base", tensors, plain)}
    found["one"] = save(root / "one", near(tensors, 1), plain, shards=3)
    found["two"] = save(root / "two", near(tensors, 2), plain)
    found["sharded"] = save(root / "sharded", tensors, plain, shards=2)
    return found


def recipe(method: str, models: Mapping[str, Path], base: str = "base", **changes: Any) -> dict[str, Any]:
    """A recipe of the two models on the base, with parameters that fit the method."""
    parameters: dict[str, Any] = {"weight": 0.6}
    if method in ("ties", "dare_linear", "dare_ties"):
        parameters["density"] = 0.5
    others = [{"model": str(models[name]), "parameters": parameters} for name in ("one", "two")]
    found: dict[str, Any] = {"merge_method": method, "base_model": str(models[base]), "models": others}
    if method == "linear":
        found["models"] = [{"model": str(models[base]), "parameters": {"weight": 1.0}}, *others]
    if method == "slerp":
        found |= {"models": [{"model": str(models["one"])}], "parameters": {"t": 0.3}}
    return {**found, **changes}


def loaded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
