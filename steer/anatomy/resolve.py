"""From a record, a configuration and the shapes of tensors to one model's anatomy; neither torch nor transformers.

The same function serves a checkpoint's headers and a loaded model, so both give one `shape_id`. What can be counted
from the tensors is counted (head width, vocabulary, biases, which layers have a dense MLP), never computed from the
configuration: hidden / heads is not the head width of Qwen3-0.6B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from steer.anatomy.record import FAMILIES, Contribution, Record, bundled, families
from steer.errors import SteerError

Shapes = Mapping[str, tuple[int, ...]]
PER_LAYER = ("attention_output", "mlp_output")


@dataclass(frozen=True)
class Contributes:
    """How one model turns a projection's output into what is added to the residual stream.

    Attributes:
        kind: `identity`, `scale` or `norm`.
        multiplier: of `scale`; 1.0 for the others.
        norm: path of the norm inside the layer, for `norm`; else empty.
    """

    kind: Literal["identity", "scale", "norm"]
    multiplier: float = 1.0
    norm: str = ""


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are, and how many.

    Attributes:
        record: the family's record.
        layers, hidden, heads, kv_heads, head_width, vocab: counts; `head_width` is the width of one head at `z`.
        attention_contribution, mlp_contribution: from `attn_raw` to `attn_out`, from `mlp_raw` to `mlp_out`.
        dense_mlp_layers: layers that have `mlp_raw`.
        tied: whether the head is the embedding, by the configuration.
        shapes: (module, layer) -> shape (out, in) of the projection; embedding and head at layer -1.
        biases: (module, layer) of the projections that have a bias.
    """

    record: Record
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    attention_contribution: Contributes
    mlp_contribution: Contributes
    dense_mlp_layers: tuple[int, ...]
    tied: bool
    shapes: Mapping[tuple[str, int], tuple[int, ...]] = field(repr=False)
    biases: frozenset[tuple[str, int]] = field(repr=False)

    @property
    def family(self) -> str:
        """The record's name."""
        return self.record.family

    def numbers(self) -> dict[str, object]:
        """Everything that a value must share with the model it is used on; hashed into `shape_id`."""
        names = ("family", "layers", "hidden", "heads", "kv_heads", "head_width", "vocab")
        return {name: getattr(self, name) for name in names}

    def disk_name(self, module: str, layer: int = -1) -> str:
        """Return the name of a weight on disk, such as `model.layers.3.self_attn.o_proj.weight`.

        Args:
            module: `attention_output`, `mlp_output`, `embedding` or `head`.
            layer: counts from 0; ignored for embedding and head. The name of a tied head is the embedding's.

        Raises:
            SteerError: no such module, layer, or dense MLP in this layer.
        """
        if module == "head" and (module, -1) not in self.shapes:
            module = "embedding"
        self.shape(module, layer)
        return f"{_pattern(self.record, module, layer)}.weight"

    def bias_name(self, module: str, layer: int) -> str:
        """Return the name on disk of the bias that goes with a weight, whether or not the model has it."""
        return self.disk_name(module, layer).removesuffix("weight") + "bias"

    def has_bias(self, module: str, layer: int) -> bool:
        """Whether this projection has a bias."""
        return (module, layer) in self.biases

    def shape(self, module: str, layer: int = -1) -> tuple[int, ...]:
        """Return the shape (out, in) of a weight.

        Raises:
            SteerError: no such module, layer, or dense MLP in this layer.
        """
        if module not in (*PER_LAYER, "embedding", "head"):
            raise SteerError(f"there is no module {module!r}", "attention_output, mlp_output, embedding or head")
        key = (module, layer if module in PER_LAYER else -1)
        if module in PER_LAYER:
            self.check_layers([layer], module)
        if key not in self.shapes:
            raise SteerError(
                f"layer {layer} of this {self.family} model has experts, so it has no {module}",
                f"one of the layers {list(self.dense_mlp_layers)}",
            )
        return self.shapes[key]

    def check_layers(self, layers: Any, what: str) -> None:
        """Refuse layers that the model does not have.

        Raises:
            SteerError: a layer is out of range.
        """
        wrong = [layer for layer in layers if not 0 <= layer < self.layers]
        if wrong:
            raise SteerError(
                f"{what} names layer {wrong[0]}", f"layers 0 to {self.layers - 1} of this {self.family} model"
            )


def resolve(config: Mapping[str, Any], shapes: Shapes, record: Record | None = None) -> Anatomy:
    """Find the anatomy of a model.

    Args:
        config: its config.json, or `hf.config.to_dict()`.
        shapes: every tensor's shape by its name on disk.
        record: the user's own; None takes the bundled one for the configuration's `model_type`.

    Raises:
        SteerError: there is no record for the family, the record does not describe it, or a tensor or number that it
            names is missing; the message shows one layer's tensors.
    """
    record = _record(config, shapes, record)
    layers, hidden, heads = (_number(record, config, name) for name in ("layers", "hidden", "heads"))
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    biases: set[tuple[str, int]] = set()
    for module in ("embedding", "head", *PER_LAYER):
        for layer in range(layers) if module in PER_LAYER else [-1]:
            name = _pattern(record, module, layer)
            if f"{name}.weight" in shapes:
                found[module, layer] = tuple(shapes[f"{name}.weight"])
            elif module != "head" and not (module == "mlp_output" and record.mlp_layers == "as_found"):
                raise _missing(record, config, shapes, f"{name}.weight")
            if f"{name}.bias" in shapes:
                biases.add((module, layer))
    return Anatomy(
        record=record,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_number(record, config, "kv_heads", heads),
        head_width=_head_width(record, found, layers, hidden, heads),
        vocab=found["embedding", -1][0],
        attention_contribution=_contributes(record, config, record.attention_contribution),
        mlp_contribution=_contributes(record, config, record.mlp_contribution),
        dense_mlp_layers=tuple(layer for layer in range(layers) if ("mlp_output", layer) in found),
        tied=bool(_number(record, config, "tied")),
        shapes=found,
        biases=frozenset(biases),
    )


def layer_tree(names: Shapes) -> str:
    """Describe the tensors of the first layer on one line, for an error about an unknown or ill-described family."""
    parts = {name: match for name in names if (match := re.fullmatch(r"(?:.*\.)?(\d+)\.(\D.*)", name))}
    if not parts:
        return "no tensor name with a layer's number in it: " + ", ".join(list(names)[:8])
    first = min(int(match[1]) for match in parts.values())
    lines = [f"{name} {list(names[name])}" for name, match in parts.items() if int(match[1]) == first]
    more = f" and {len(lines) - 16} more" if len(lines) > 16 else ""
    outside = [f"{name} {list(names[name])}" for name in names if name not in parts][:5]
    return f"layer {first}: {', '.join(lines[:16])}{more}; outside the layers: {', '.join(outside)}"


def _pattern(record: Record, module: str, layer: int) -> str:
    return str(getattr(record.disk, module)).replace("{layer}", str(layer))


def _record(config: Mapping[str, Any], shapes: Shapes, record: Record | None) -> Record:
    model_type = str(config.get("model_type", ""))
    found = record or bundled(model_type)
    if found is None:
        raise SteerError(
            f"there is no anatomy record for the family {model_type!r}; its tensors are: {layer_tree(shapes)}",
            f"one of {', '.join(families())}",
            f"Write a record: copy the nearest of {FAMILIES.parent.name}/{FAMILIES.name}/*.yaml, set model_types, module paths and contributions "
            "(docs/anatomy.md explains each key), give it with anatomy=FILE, and let the self-check prove it",
        )
    if model_type not in found.model_types:
        raise SteerError(
            f"the record {found.family!r} describes {', '.join(found.model_types)}",
            f"one for {model_type!r}",
            "Add the type to model_types",
        )
    return found


def _missing(record: Record, config: Mapping[str, Any], shapes: Shapes, name: str) -> SteerError:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        return SteerError(
            f"the checkpoint is quantised ({method}), it has no plain {name}",
            "weights in bf16, fp16 or fp32",
            "Take the unquantised model for headers and edits",
        )
    return SteerError(
        f"the model has no tensor {name}, which the record {record.family!r} names; there are: {layer_tree(shapes)}",
        "a record that fits",
        "Correct the pattern under `disk` in a copy of the record and give it with anatomy=FILE",
    )


def _number(record: Record, config: Mapping[str, Any], name: str, absent: int | None = None) -> int:
    key = getattr(record.numbers, name)
    value = config.get(key, record.defaults.get(key))
    value = absent if value is None else value
    if not isinstance(value, int):
        raise SteerError(
            f"config.json has {key} = {value!r}",
            "a whole number",
            f"Complete the configuration, or put {key} under `defaults` in the record",
        )
    return value


def _head_width(
    record: Record, found: Mapping[tuple[str, int], tuple[int, ...]], layers: int, hidden: int, heads: int
) -> int:
    widths = {found["attention_output", layer] for layer in range(layers)}
    if len(widths) != 1 or len(shape := next(iter(widths))) != 2 or shape[0] != hidden or shape[1] % heads:
        raise SteerError(
            f"the attention output projections have the shapes {sorted(map(list, widths))}",
            f"one shape ({hidden}, {heads} heads x head width) on all layers",
            f"If the model is quantised, take the unquantised one; else the record {record.family!r} does not describe it",
        )
    return shape[1] // heads


def _contributes(record: Record, config: Mapping[str, Any], contribution: Contribution) -> Contributes:
    if contribution.kind != "scale":
        return Contributes(contribution.kind, norm=contribution.module)
    value = config.get(contribution.key, record.defaults.get(contribution.key))
    if not isinstance(value, int | float) or not value:
        raise SteerError(f"config.json has {contribution.key} = {value!r}", "a number that is not 0")
    return Contributes("scale", multiplier=float(value))
