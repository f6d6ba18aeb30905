"""Checkpoints for measuring: random bf16 numbers in the shapes of a dense llama, in four shards."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edits.checkpoint.stream import safetensors_header
from steer.operations import ProjectColumns
from steer.patches import Patch

SHARDS, SHARE, DRAWN = 4, 0.04, 1 << 22


@dataclass(frozen=True)
class Shape:
    """Numbers of a family; those given are of a model of hidden size 2048."""

    hidden: int = 2048
    heads: int = 16
    inner: int = 5632
    vocab: int = 32000

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer."""
        h, inner = self.hidden, self.inner
        matrices: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (h, h) for name in "qo"}
        matrices |= {f"self_attn.{name}_proj": (h // 4, h) for name in "kv"}
        matrices |= {f"mlp.{name}_proj": (inner, h) for name in ("gate", "up")} | {"mlp.down_proj": (h, inner)}
        return matrices | {f"{name}_layernorm": (h,) for name in ("input", "post_attention")}

    def layers(self, gigabytes: float) -> int:
        """How many layers make a checkpoint of about that size."""
        per_layer = sum(2 * int(np.prod(shape)) for shape in self.layer().values())
        return max(SHARDS, round((gigabytes * 1e9 - 4 * self.vocab * self.hidden) / per_layer))

    def config(self, layers: int) -> dict[str, object]:
        """The `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 4, "head_dim": self.hidden // self.heads, "vocab_size": self.vocab,
            "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        }  # fmt: skip


SMALL = Shape(256, 4, 704, 2000)  # For trying the programs out.


def make(folder: Path, gigabytes: float, shape: Shape, seed: int = 0) -> Path:
    """Write a checkpoint of about that size; another seed gives a model near that of seed 0, as a tuned one is."""
    layers = shape.layers(gigabytes)
    names = {f"model.layers.{n}.{part}.weight": dims for n in range(layers) for part, dims in shape.layer().items()}
    names |= {"model.norm.weight": (shape.hidden,)}
    names |= {f"{name}.weight": (shape.vocab, shape.hidden) for name in ("model.embed_tokens", "lm_head")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(layers)))
    noise, index = _numbers(seed), {}
    cut = np.linspace(0, len(names), SHARDS + 1).astype(int)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {
            name: ("BF16", names[name], 2 * int(np.prod(names[name])))
            for name in list(names)[cut[shard] : cut[shard + 1]]
        }
        index |= dict.fromkeys(part, file)
        with (folder / file).open("wb") as stream:
            stream.write(safetensors_header(part, {"format": "pt"}))
            for _, _, count in part.values():
                stream.write(np.resize(noise, count).data)
    size = sum(2 * int(np.prod(dims)) for dims in names.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def _numbers(seed: int) -> np.ndarray:
    base = 0.02 * torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    change = 0.002 * torch.randn(DRAWN, generator=torch.Generator().manual_seed(seed)) if seed else 0.0
    return (base + change).bfloat16().view(torch.uint8).numpy()


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def patch_for(folder: Path) -> Patch:
    """Return a patch of 4 % of all heads as ThinkEdit makes it, at least one head in each shard that has any."""
    config = json.loads((folder / "config.json").read_text())
    layers, heads, hidden = (config[f"{key}"] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first = {files[f"model.layers.{layer}.self_attn.o_proj.weight"]: layer for layer in reversed(range(layers))}
    chosen = {(layer, 0) for layer in first.values()}
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen |= set(random.Random(0).sample(every, max(0, round(SHARE * len(every)) - len(chosen))))
    vectors = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(0))
    found = {layer: tuple(sorted(head for at, head in chosen if at == layer)) for layer, _ in sorted(chosen)}
    return Patch(
        tuple(ProjectColumns(layer, "attention_output", picked, vectors[layer]) for layer, picked in found.items())
    )


def recipe_for(folders: list[Path]) -> dict[str, object]:
    """Return task arithmetic of the last two folders on the first, in mergekit's format; float32, one cast to bf16."""
    base, *models = (str(folder) for folder in folders)
    return {
        "merge_method": "task_arithmetic", "base_model": base, "dtype": "float32", "out_dtype": "bfloat16",
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
    }  # fmt: skip
