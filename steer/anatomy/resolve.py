"""From a record, a configuration and the shapes of tensors to one model's anatomy; neither torch nor transformers.

The same function serves a checkpoint's headers and a loaded model, so both give one `shape_id`. What can be counted
from the tensors is counted (head width, vocabulary, biases, which layers have a dense MLP), never computed from the
configuration: hidden / heads is not the head width of Qwen3-0.6B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from steer.anatomy import naming
from steer.anatomy.record import FAMILIES, Contribution, OutputBias, Record, bundled, families
from steer.anatomy.slots import EXPERTS, OUTSIDE, Matrix, Slot
from steer.errors import SteerError

Shapes = Mapping[str, tuple[int, ...]]
PER_LAYER = ("attention_output", "mlp_output")
TEXT = "text_config"


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
        linear_layers: layers with linear attention: they have an attention output, but no heads and no `z`.
        expert_layers: layers that have experts.
        experts: how many each of them has; 0 where there are none.
        expert_width: rows of one expert's gate.
        chosen: how many experts a token chooses; 0 where there are none, or the record does not say.
        groups, chosen_groups: how many groups of neighbouring experts there are, and from how many a token chooses.
        stored: names of the tensors that it was found by, as the record spells them -> as they are stored.
        nested: where in config.json the numbers stand: empty, or `text_config.` in one that describes more than the text model.
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
    linear_layers: tuple[int, ...] = ()
    expert_layers: tuple[int, ...] = ()
    experts: int = 0
    expert_width: int = 0
    chosen: int = 0
    groups: int = 1
    chosen_groups: int = 1
    stored: Mapping[str, str] = field(default_factory=dict, repr=False)
    nested: str = ""

    @property
    def family(self) -> str:
        """The record's name."""
        return self.record.family

    def numbers(self) -> dict[str, object]:
        """Everything that a value must share with the model it is used on; hashed into `shape_id`."""
        names = ("family", "layers", "hidden", "heads", "kv_heads", "head_width", "vocab")
        return {name: getattr(self, name) for name in names}

    @property
    def extra_writers(self) -> tuple[str, ...]:
        """What the record declares to write to the stream at a layer's end beside attention and MLP, where it is there."""
        declared = self.record.layer_end.extra if self.record.layer_end else ()
        return tuple(path for path in declared if f"{naming.layer_path(self.record, 0, path)}.weight" in self.stored)

    def site_layers(self, site: str) -> tuple[int, ...]:
        """Return the layers that have a site.

        `mlp_raw` is where there is a dense MLP, `router_logits` and `router` where there are experts, `head_out` where there
        are heads, and `z` where they are as wide as in the first such layer: directions and means at `z` have one width
        (Gemma 4 has another in its full-attention layers).
        """
        if site == "mlp_raw":
            return self.dense_mlp_layers
        if site in ("router_logits", "router"):
            return self.expert_layers
        found = tuple(layer for layer in range(self.layers) if layer not in self.linear_layers)
        if site == "z":
            return tuple(layer for layer in found if self.head_width_of(layer) == self.head_width)
        return found if site == "head_out" else tuple(range(self.layers))

    def lacks(self, site: str, layer: int) -> str:
        """Say why a layer does not have a site that others have."""
        if site == "mlp_raw":
            return "has experts"
        if site in ("router_logits", "router"):
            return "has no experts"
        if layer in self.linear_layers:
            return "has linear attention"
        return f"has heads of width {self.head_width_of(layer)}, not {self.head_width}"

    def head_width_of(self, layer: int) -> int:
        """Columns per head of one layer's attention output projection."""
        return self.shapes["attention_output", layer][1] // self.heads

    def on_disk(self, matrix: Matrix) -> Slot:
        """Return where a matrix is in the checkpoint that this anatomy was read from, by its headers.

        The head of a tied checkpoint that stores none is the embedding.

        Raises:
            SteerError: the checkpoint has no such matrix; it is named.
        """
        if matrix.raw:
            if matrix.module in self._names:
                return Slot(matrix.module)
            raise SteerError(
                f"the checkpoint has no tensor {matrix.module}",
                "every tensor that the patch names",
                "Give a patch made for this model",
            )
        found = naming.on_disk(self.record, matrix, self.stored, self.expert_width, matrix.layer in self.linear_layers)
        if found is None and matrix.module == "head" and not matrix.bias and self.tied:
            found = self.on_disk(Matrix(-1, "embedding"))
            return Slot(found.name)
        if found is None:
            self._check_exists(matrix)
            what = "output bias" if matrix.bias else "tensor"
            raise SteerError(
                f"the checkpoint has no {what} for {matrix}",
                "every tensor that the patch names",
                "Check that the checkpoint is complete, or leave it out",
            )
        return found

    def in_memory(self, matrix: Matrix) -> Slot:
        """Return where a matrix is in a loaded model of this family: the path of a parameter, and the part of it.

        A tensor's own name is understood as a checkpoint spells it: `…experts.3.gate_proj.weight` is the first half of
        expert 3 of the fused `gate_up_proj`. The head of a tied model is a name of the embedding's parameter.

        Raises:
            SteerError: the model has no such matrix.
        """
        if not matrix.raw:
            self._check_exists(matrix)
        return naming.in_memory(self.record, matrix, self.expert_width, matrix.layer in self.linear_layers)

    def matrices(self, word: str) -> tuple[Matrix, ...]:
        """Return every matrix that a word names, in order of layer and expert; biases not included."""
        if word in OUTSIDE:
            return (Matrix(-1, word),) if word == "embedding" or ("head", -1) in self.shapes else ()
        if word in EXPERTS:
            return tuple(Matrix(layer, word, expert) for layer in self.expert_layers for expert in range(self.experts))
        if word in PER_LAYER:
            return tuple(Matrix(layer, word) for layer in range(self.layers) if (word, layer) in self.shapes)
        if self.record.experts is None or (word == "shared_expert_output" and not self.record.experts.shared_output):
            return ()
        return tuple(Matrix(layer, word) for layer in self.expert_layers)

    @cached_property
    def _names(self) -> frozenset[str]:
        """Names of tensors as they are stored."""
        return frozenset(self.stored.values())

    def _has(self, matrix: Matrix) -> bool:
        """Whether the model has a matrix of a layer."""
        word, experts = matrix.module, self.record.experts
        if word in PER_LAYER:
            return (word, matrix.layer) in self.shapes
        if matrix.layer not in self.expert_layers or experts is None:
            return False
        if word in EXPERTS:
            return matrix.expert < self.experts
        return word == "router" or bool(experts.shared_output)

    def _check_exists(self, matrix: Matrix) -> None:
        """Refuse a matrix that the model does not have, by name."""
        if matrix.module in OUTSIDE:
            return
        word = matrix.module
        self.check_layers([matrix.layer], f"{matrix}:")
        if self._has(matrix):
            return
        if word in EXPERTS and matrix.layer in self.expert_layers:
            named = Matrix(matrix.layer, word, matrix.expert)
            raise SteerError(f"{named} was named", f"experts 0 to {self.experts - 1} of this {self.family} model")
        if word in PER_LAYER:
            self.shape(word, matrix.layer)
        where = f"one of the layers {list(self.expert_layers)}" if self.expert_layers else "a matrix that it has"
        raise SteerError(f"layer {matrix.layer} of this {self.family} model has no {word}", where)

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
        name = f"{_pattern(self.record, module, layer, layer in self.linear_layers)}.weight"
        return self.stored.get(name, name)

    def has_bias(self, module: str, layer: int, expert: int = -1) -> bool:
        """Whether this projection has a bias."""
        if module in PER_LAYER:
            return (module, layer) in self.biases
        matrix = Matrix(layer, module, expert, bias=True)
        return naming.on_disk(self.record, matrix, self.stored, self.expert_width, False) is not None

    def output_bias(self, module: str) -> OutputBias | None:
        """Return what makes the family load an output bias where the checkpoint has none; None where nothing does."""
        found: OutputBias | None = self.record.output_bias.get(module)  # type: ignore[call-overload]
        return found if found is None else found.model_copy(update={"key": self.nested + found.key})

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
    config, nested = _text_config(config)
    stored = naming.canonical(record, shapes)
    shapes = {name: tuple(shapes[actual]) for name, actual in stored.items()}
    layers, hidden, heads = (_number(record, config, name) for name in ("layers", "hidden", "heads"))
    linear = _linear_layers(record, shapes, layers)
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    biases: set[tuple[str, int]] = set()
    for module in ("embedding", "head", *PER_LAYER):
        for layer in range(layers) if module in PER_LAYER else [-1]:
            name = _pattern(record, module, layer, layer in linear)
            if f"{name}.weight" in shapes:
                found[module, layer] = shapes[f"{name}.weight"]
            elif module != "head" and not (module == "mlp_output" and record.mlp_layers == "as_found"):
                raise _missing(record, config, shapes, f"{name}.weight")
            if f"{name}.bias" in shapes:
                biases.add((module, layer))
    expert_layers, experts, width = _experts(record, shapes, layers, bool(config.get("quantization_config")))
    if len(found["embedding", -1]) != 2:
        raise SteerError(
            f"the embedding has the shape {list(found['embedding', -1])}",
            "(vocabulary, hidden)",
            f"If the model is quantised, take the unquantised one; else the record {record.family!r} does not describe it",
        )
    return Anatomy(
        record=record,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_number(record, config, "kv_heads", heads),
        head_width=_head_width(record, found, [layer for layer in range(layers) if layer not in linear], hidden, heads),
        vocab=found["embedding", -1][0],
        attention_contribution=_contributes(record, config, record.attention_contribution),
        mlp_contribution=_contributes(record, config, record.mlp_contribution),
        dense_mlp_layers=tuple(layer for layer in range(layers) if ("mlp_output", layer) in found),
        tied=bool(_number(record, config, "tied")),
        shapes=found,
        biases=frozenset(biases),
        linear_layers=linear,
        expert_layers=expert_layers,
        experts=experts,
        expert_width=width,
        chosen=_counted(record, config, "chosen", 0) if expert_layers else 0,
        groups=_counted(record, config, "groups", 1),
        chosen_groups=_counted(record, config, "chosen_groups", 1),
        stored=stored,
        nested=nested,
    )


def _text_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part of a configuration that describes the text model, as transformers takes it, and where it stands."""
    text = config.get(TEXT)
    if not isinstance(text, Mapping):
        return config, ""
    return {"quantization_config": config.get("quantization_config"), **text}, f"{TEXT}."


def _linear_layers(record: Record, shapes: Shapes, layers: int) -> tuple[int, ...]:
    if not record.disk.linear_attention_output:
        return ()
    possible = range(min(layers, len(shapes)))  # A layer has at least one tensor, whatever the configuration says.
    return tuple(layer for layer in possible if f"{_pattern(record, 'attention_output', layer, True)}.weight" in shapes)


def _experts(record: Record, shapes: Shapes, layers: int, quantised: bool) -> tuple[tuple[int, ...], int, int]:
    """Layers with experts, how many each has, and the rows of one expert's gate, all counted from tensors.

    A layer of a quantised checkpoint counts only where all its experts are plain, so that none is left out of an edit.

    Raises:
        SteerError: layers differ in it, or a layer has fewer experts than its router has rows.
    """
    if record.experts is None:
        return (), 0, 0
    counted = {layer: found for layer in range(layers) if (found := _experts_of(record, shapes, layer)) is not None}
    for layer, (number, _) in list(counted.items()):
        names = [f"{pattern.replace('{layer}', str(layer))}.weight" for pattern in naming.patterns(record, "router")]
        rows = [shapes[name][0] for name in names if len(shapes.get(name, ())) == 2]
        if rows and number != rows[0] and not quantised:
            raise SteerError(
                f"layer {layer} of this {record.family} model has {number} experts in plain tensors and a router of {rows[0]}",
                "one expert for every row of the router",
                "Check that the checkpoint is complete; if a part of it is quantised, take the unquantised one",
            )
        if rows and number != rows[0]:
            del counted[layer]
    if len(set(counted.values())) > 1:
        raise SteerError(
            f"the layers of this {record.family} model have experts (number, width) {sorted(set(counted.values()))}",
            "as many of one width in every layer that has any",
        )
    return tuple(counted), *next(iter(counted.values()), (0, 0))


def _experts_of(record: Record, shapes: Shapes, layer: int) -> tuple[int, int] | None:
    turned = record.experts is not None and record.experts.stored == "in_out"
    for pattern in record.disk.experts_gate_up:
        fused = shapes.get(pattern.replace("{layer}", str(layer)))
        if fused is not None and len(fused) == 3:
            return fused[0], fused[2 if turned else 1] // 2
    for pattern in record.disk.expert_gate:
        of_layer = pattern.replace("{layer}", str(layer)) + ".weight"
        count = 0
        while of_layer.replace("{expert}", str(count)) in shapes:
            count += 1
        if count:
            return count, (shapes[of_layer.replace("{expert}", "0")] or (0,))[0]
    return None


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


def _pattern(record: Record, module: str, layer: int, linear: bool) -> str:
    return naming.patterns(record, module, linear)[0].replace("{layer}", str(layer))


def _record(config: Mapping[str, Any], shapes: Shapes, record: Record | None) -> Record:
    model_type = str(config.get("model_type", ""))
    found = record or bundled(model_type) or _of_text_model(config, model_type)
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


def _of_text_model(config: Mapping[str, Any], model_type: str) -> Record | None:
    """The record of the text model inside a larger one, where transformers loads that alone (Qwen 3.5, not Gemma 3)."""
    text = config.get(TEXT)
    found = bundled(str(text.get("model_type", ""))) if isinstance(text, Mapping) else None
    return found if found is not None and model_type in found.model_types else None


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
    if not isinstance(value, int) or (name != "tied" and value < 1):
        raise SteerError(
            f"config.json has {key} = {value!r}",
            "a whole number" + ("" if name == "tied" else " from 1 on"),
            f"Complete the configuration, or put {key} under `defaults` in the record",
        )
    return value


def _counted(record: Record, config: Mapping[str, Any], name: str, absent: int) -> int:
    """A number that not every record names."""
    return _number(record, config, name, absent) if getattr(record.numbers, name) else absent


def _head_width(
    record: Record, found: Mapping[tuple[str, int], tuple[int, ...]], layers: Sequence[int], hidden: int, heads: int
) -> int:
    """Columns per head of the projections in `layers`, those with heads; of Gemma 4, which has two widths, the first."""
    shapes = [found["attention_output", layer] for layer in layers]
    odd = [shape for shape in shapes if len(shape) != 2 or shape[0] != hidden or shape[1] % heads]
    if odd or not shapes:
        raise SteerError(
            f"the attention output projections have the shapes {sorted(map(list, set(shapes)))}",
            f"({hidden}, {heads} heads x head width) on all layers with heads",
            f"If the model is quantised, take the unquantised one; else the record {record.family!r} does not describe it",
        )
    return shapes[0][1] // heads


def _contributes(record: Record, config: Mapping[str, Any], contribution: Contribution) -> Contributes:
    if contribution.kind != "scale":
        return Contributes(contribution.kind, norm=contribution.module)
    value = config.get(contribution.key, record.defaults.get(contribution.key))
    if not isinstance(value, int | float) or not value or not math.isfinite(value):
        raise SteerError(f"config.json has {contribution.key} = {value!r}", "a number that is not 0")
    return Contributes("scale", multiplier=float(value))
