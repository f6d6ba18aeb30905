"""Patches, folders and failures that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steer.operations import Matrix, ProjectColumns
from steer.patches import Patch

HIDDEN = 48
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "gemma2", "gemma3_text", "olmo2", "qwen3_moe",
)  # fmt: skip
HEADS = ((0, (1, 3)), (2, (0,)))


def patch(
    heads: Sequence[tuple[int, Sequence[int]]] = HEADS, weight: float = 1.0, seed: int = 7, hidden: int = HIDDEN
) -> Patch:
    """Return a patch with a random direction per layer."""
    generator = torch.Generator().manual_seed(seed)
    operations = [
        ProjectColumns(layer, "attention_output", tuple(chosen), torch.randn(hidden, generator=generator), weight)
        for layer, chosen in heads
    ]
    return Patch(tuple(operations))


def attention_output(model: Any, layer: int) -> torch.nn.Parameter:
    """The output projection of a layer, named as all of these families name it in memory."""
    return model.model.layers[layer].self_attn.o_proj.weight


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def matrix(layer: int) -> Matrix:
    """The attention output of a layer."""
    return Matrix(layer, "attention_output")
