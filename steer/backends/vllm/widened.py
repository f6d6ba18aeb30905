"""Wider heads, the same function: what lets vLLM's kernels for processors run a bundled organism.

These kernels know heads of 32 numbers and more; the organisms have 16. A head of d numbers is written into one of 2d:

* rotation turns the pairs (i, i + d/2); of 2d numbers, (i, i + d). So the two halves go to 0 and d, and the base of the
  frequencies becomes its square: (theta^2)^(-2i/2d) = theta^(-2i/d).
* the norm of queries and keys divides by the root mean square, over twice as many numbers now: sqrt 2 less, so keys' weight
  is divided by sqrt 2; queries' is not, since scores are divided by sqrt(2d) instead of sqrt(d).
* values and the output projection's columns get zeros behind them.

The norm's epsilon is added to half the mean square, a relative difference of about 1e-6 in float32; everything else is
exact. The copy is kept in float32, so that the division by sqrt 2 is not rounded to a shorter type.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.errors import SteerError

NARROWEST = 32
FAMILIES = ("qwen3", "qwen3_moe")


def head_width(folder: str | Path) -> int:
    """Return the head width that a checkpoint's config.json states or implies; 0 where it says neither."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    width = config.get("head_dim")
    return int(width or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1))


def widen(folder: str | Path, out: str | Path) -> Path:
    """Write a copy of a checkpoint whose heads are twice as wide, and return its folder.

    Args:
        folder: a checkpoint of one file, of Qwen 3 or Qwen 3 with experts.
        out: does not exist yet.

    Raises:
        SteerError: another family.
    """
    folder, out = Path(folder), Path(out)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in FAMILIES:
        raise SteerError(f"heads of a {config['model_type']} model were to be widened", " or ".join(FAMILIES))
    width = head_width(folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("model.safetensors", "config.json"):
            shutil.copyfile(path, out / path.name)
    save_file(_widened(tensors, width), out / "model.safetensors", metadata={"format": "pt"})
    config |= {"head_dim": 2 * width, "dtype": "float32"}
    config["rope_parameters"] = {
        **config["rope_parameters"],
        "rope_theta": config["rope_parameters"]["rope_theta"] ** 2,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def _widened(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _halves(tensor.view(-1, width, tensor.shape[1]), 1).flatten(0, 1)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor = _halves(tensor, 0) / (2**0.5 if name.endswith("k_norm.weight") else 1)
        elif name.endswith("v_proj.weight"):
            rows = tensor.view(-1, width, tensor.shape[1])
            tensor = torch.cat([rows, torch.zeros_like(rows)], 1).flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            columns = tensor.view(tensor.shape[0], -1, width)
            tensor = torch.cat([columns, torch.zeros_like(columns)], 2).flatten(1, 2)
        found[name] = tensor.contiguous()
    return found


def _halves(tensor: Tensor, axis: int) -> Tensor:
    """Put zeros behind each half of an axis."""
    first, second = tensor.chunk(2, dim=axis)
    return torch.cat([first, torch.zeros_like(first), second, torch.zeros_like(second)], dim=axis)
