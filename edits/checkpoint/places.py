"""Where matrices lie on disk, as the anatomy says; attention output, MLP output, embedding and head where it does not."""

from __future__ import annotations

from typing import Any

from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError


def on_disk(anatomy: Anatomy, matrix: Matrix) -> Slot:
    """Return where a matrix lies."""
    if hasattr(anatomy, "on_disk"):
        found: Slot = anatomy.on_disk(matrix)
        return found
    if matrix.module not in ("attention_output", "mlp_output", "embedding", "head"):
        raise SteerError(f"{matrix} cannot be found on disk", "attention_output, mlp_output, embedding or head")
    name = anatomy.disk_name(matrix.module, matrix.layer)
    stem = name.removesuffix("weight")
    return Slot(stem + "bias" if matrix.bias else name, transposed=matrix.module == "embedding")


def count(anatomy: Anatomy, word: str) -> int:
    """Return how many matrices of a word there are."""
    if hasattr(anatomy, "matrices"):
        return len(anatomy.matrices(word))
    return len(anatomy.dense_mlp_layers) if word == "mlp_output" else anatomy.layers


def has_bias(anatomy: Anatomy, matrix: Matrix) -> bool:
    """Whether a matrix has its bias on disk."""
    if matrix.expert >= 0:
        return bool(anatomy.has_bias(matrix.module, matrix.layer, matrix.expert))  # type: ignore[call-arg]
    return anatomy.has_bias(matrix.module, matrix.layer)


def output_bias(anatomy: Anatomy, word: str) -> Any:
    """Return which key of the configuration switches the biases of a word on, and its companions; None for no key."""
    return anatomy.output_bias(word) if hasattr(anatomy, "output_bias") else None
