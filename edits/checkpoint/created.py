"""What a checkpoint gets beside changed numbers: output biases that it lacks, a head of its own, keys of config.json.

An output bias exists in a model only if a key of its configuration says so, and that key switches other biases on
too (`attention_bias` of a llama: q, k, v and o, in every layer). All of them must then be in the checkpoint, so they
are made, as zeros, which change nothing; `apply` lists them. Untying copies the embedding, as it was before the
edit, to the head's name. New tensors go into the shard of the weight that they belong to.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from edits.checkpoint.touched import SlotEdit, Touched
from steer.anatomy.headers import Headers
from steer.anatomy.record import OutputBias
from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import Matrix
from steer.errors import SteerError

Config = dict[str, Any]


def biases(
    wanted: Mapping[Matrix, SlotEdit], anatomy: Anatomy, headers: Headers, dtype: str | None
) -> tuple[list[Touched], Config]:
    """Return the biases to make, and what config.json must say.

    Args:
        wanted: biases that are not in the checkpoint, with what is done to them.
        anatomy: of the checkpoint.
        headers: of the checkpoint.
        dtype: of the result, where 16-bit tensors are widened.

    Raises:
        SteerError: the family cannot load such a bias.
    """
    names = {edit.slot.name: edit for edit in wanted.values()}
    config: Config = {}
    reasons: dict[str, str] = {}
    for matrix in wanted:
        found = anatomy.output_bias(matrix.module)
        if found is None or matrix.layer in anatomy.linear_layers:
            raise no_bias(matrix, anatomy)
        config[found.key] = True
        for layer in range(anatomy.layers):
            for weight in companions(matrix.module, layer, found, anatomy, headers):
                reasons.setdefault(bias_of(weight), f"zeros, since {found.key} switches it on")
    made = []
    for name, reason in reasons.items():
        if name in headers.tensors:
            continue
        entry = headers.tensors[name.removesuffix("bias") + "weight"]
        edits = (names[name],) if name in names else ()
        made.append(Touched(name, entry.file, dtype or entry.dtype, entry.shape[:1], None, edits, reason))
    return made, config


def companions(word: str, layer: int, found: OutputBias, anatomy: Anatomy, headers: Headers) -> list[str]:
    """Names of the weights of a layer whose biases one key switches on, the output projection among them."""
    if Matrix(layer, word) not in anatomy.matrices(word) or (
        word == "attention_output" and layer in anatomy.linear_layers
    ):
        return []
    own = anatomy.on_disk(Matrix(layer, word)).name
    begin = own[: own.index(f".{layer}.") + len(f".{layer}.")]
    return [own, *(name for path in found.companions if (name := f"{begin}{path}.weight") in headers.tensors)]


def bias_of(weight: str) -> str:
    """Return the name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def no_bias(matrix: Matrix, anatomy: Anatomy) -> SteerError:
    """Say that a family has no such bias."""
    return SteerError(
        f"the checkpoint has no {matrix}, and models of the family {anatomy.family} load none",
        "a projection with a bias",
        "Use the hook form, `model.steered(steering)`, or `steer serve` with the steering",
    )


def untied_head(
    anatomy: Anatomy, headers: Headers, edits: tuple[SlotEdit, ...], dtype: str | None
) -> tuple[Touched, Config]:
    """Return the head as a copy of the embedding, and what config.json must say.

    Raises:
        SteerError: the head is not tied.
    """
    key = anatomy.record.numbers.tied
    name = head_name(anatomy)
    if not anatomy.tied:
        raise SteerError(
            f"{headers.folder} has a vocabulary head of its own ({key} is false)",
            "a model whose head is its embedding",
            "Leave --untie out",
        )
    entry = headers.tensors[anatomy.disk_name("embedding")]
    untied = Touched(
        name, entry.file, dtype or entry.dtype, entry.shape, entry, edits, "a copy of the embedding, untied"
    )
    return untied, {anatomy.nested + key: False}


def head_name(anatomy: Anatomy) -> str:
    """Return the name that an untied head has on disk."""
    return f"{anatomy.record.disk.head}.weight"


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return a configuration with dotted keys set.

    Raises:
        SteerError: a key leads through something that is no object.
    """
    result = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SteerError(f"{key!r} leads through {part!r}, which is no object of config.json", "a dotted key")
        place[last] = value
    return result


def dtype_changes(config: Mapping[str, Any], word: str) -> Config:
    """Return the dotted keys that say another dtype: those that are there, at any depth, else `dtype`."""
    found: Config = {}

    def look(part: Mapping[str, Any], before: str) -> None:
        for key, value in part.items():
            if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str)):
                found[before + key] = word
            elif isinstance(value, Mapping):
                look(value, f"{before}{key}.")

    look(config, "")
    return found or {"dtype": word}


def dumped(config: Mapping[str, Any]) -> str:
    """Return a configuration as transformers writes it, keys in their order."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
