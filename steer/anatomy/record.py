"""Records: what a family calls its parts, read from a YAML file and checked (see docs/anatomy.md).

A record names modules and configuration keys; it holds no number of any model. The bundled ones lie in
`families/`, named after the family; a user's own is given as `anatomy=FILE`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from steer import yaml_text
from steer.errors import SteerError

FAMILIES = Path(__file__).parent / "families"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Contribution(_Strict):
    """How a projection's output becomes what is added to the residual stream.

    Attributes:
        kind: `identity` (added as it is), `scale` (times a number) or `norm` (through a norm).
        key: configuration key of the number, for `scale`.
        module: path of the norm inside the layer, for `norm`.
    """

    kind: Literal["identity", "scale", "norm"]
    key: str = ""
    module: str = ""


def _contribution(value: Any) -> Any:
    if value == "identity":
        return {"kind": "identity"}
    if isinstance(value, dict) and set(value) == {"scale"}:
        return {"kind": "scale", "key": value["scale"]}
    if isinstance(value, dict) and set(value) == {"norm"}:
        return {"kind": "norm", "module": value["norm"]}
    raise ValueError("a contribution is `identity`, `{scale: CONFIG_KEY}` or `{norm: MODULE}`")


Contributes = Annotated[Contribution, BeforeValidator(_contribution)]


class Numbers(_Strict):
    """Configuration keys under which a model's numbers stand.

    Attributes:
        layers, hidden, heads, kv_heads, tied: see `steer.anatomy.resolve.Anatomy`.
        chosen: of how many experts a token chooses; empty where there are none.
        groups, chosen_groups: of how many groups the experts lie in, and from how many a token chooses; empty for 1.
    """

    layers: str
    hidden: str
    heads: str
    kv_heads: str
    tied: str
    chosen: str = ""
    groups: str = ""
    chosen_groups: str = ""


class ModelParts(_Strict):
    """Paths of modules from the causal language model."""

    backbone: str
    layers: str
    embedding: str
    head: str


class LayerParts(_Strict):
    """Paths of modules from one layer.

    Attributes:
        attention, mlp: the blocks, whose outputs go towards the residual stream.
        attention_output, mlp_output: the last projection of each block.
        before_mlp: the module whose input is the residual stream after attention (`resid_mid`).
    """

    attention: str
    attention_output: str
    mlp: str
    mlp_output: str
    before_mlp: str


class LinearParts(_Strict):
    """Paths from a layer with linear attention, which has no heads and no `z`: the block and its last projection."""

    attention: str
    attention_output: str


class Experts(_Strict):
    """How a layer keeps its experts in memory, where transformers 5 fuses them into two parameters.

    Attributes:
        module: path in the layer; holds `gate_up_proj` and `down_proj`, experts first.
        router: path in the layer of what chooses them.
        shared_output: path of the last projection of the expert that every token passes; empty where there is none.
        stored: `out_in`, or `in_out` where each expert's matrix is kept turned round.
        gate_up: whether gate and up are the two `halves` of the out axis, or `interleaved` row by row.
        weights_sum: of the weights of a token's chosen experts, where it is one number for every token (a softmax over
            the chosen ones); None where it varies. Asked for only where the experts have biases.
    """

    module: str
    router: str
    shared_output: str = ""
    stored: Literal["out_in", "in_out"] = "out_in"
    gate_up: Literal["halves", "interleaved"] = "halves"
    weights_sum: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class OutputBias(_Strict):
    """What makes the family load an output bias: a key of config.json, and which other projections then have one.

    Attributes:
        key: set to true.
        companions: paths in the layer of the projections that must then have a bias too.
    """

    key: str
    companions: tuple[str, ...] = ()


class LayerEnd(_Strict):
    """What a layer does after the MLP: `resid_post = scale x (resid_mid + mlp_out + extra)`.

    Attributes:
        scale: path in the layer of a tensor of one number; empty for 1.
        extra: paths in the layer of modules whose outputs are added too.
    """

    scale: str = ""
    extra: tuple[str, ...] = ()


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Disk(_Strict):
    """Names of tensors in a checkpoint; `{layer}` and `{expert}` stand for numbers.

    All but the last three are without `.weight` or `.bias`. Where there are several, the headers decide.

    Attributes:
        attention_output, mlp_output, embedding, head: as the words.
        linear_attention_output: the attention output of layers with linear attention.
        router, shared_expert_output: as the words.
        expert_gate, expert_up, expert_down: of one expert.
        experts_gate_up, experts_down: whole names of the tensors that hold all experts.
        prefixes: beginnings of names that stand for others, such as `model.language_model.` for `model.`.
    """

    attention_output: str
    mlp_output: str
    embedding: str
    head: str
    linear_attention_output: str = ""
    router: Names = ()
    shared_expert_output: Names = ()
    expert_gate: Names = ()
    expert_up: Names = ()
    expert_down: Names = ()
    experts_gate_up: Names = ()
    experts_down: Names = ()
    prefixes: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _numbered(self) -> Disk:
        """Refuse a pattern that would name one tensor for every layer, or for every expert."""
        for word in type(self).model_fields:
            patterns = () if word in ("embedding", "head", "prefixes") else getattr(self, word)
            numbers = ["{layer}", *(["{expert}"] if word in ("expert_gate", "expert_up", "expert_down") else [])]
            for pattern in filter(None, _several(patterns)):
                missing = [number for number in numbers if pattern.count(number) != 1]
                if missing:
                    raise ValueError(f"{word} is {pattern!r}, without {' and '.join(missing)} once")
        return self


class Record(_Strict):
    """The anatomy of one family.

    Attributes:
        family: the record's own name.
        model_types: the `model_type`s of configurations that it describes.
        numbers, defaults: configuration keys, and what the family's configuration class assumes where one is absent.
        model, layer: module paths in a loaded model.
        attention_contribution, mlp_contribution: from `attn_raw` to `attn_out`, from `mlp_raw` to `mlp_out`.
        mlp_layers: `all` layers have one dense MLP, or `as_found`: some have experts instead.
        linear_layer: paths in layers with linear attention; None where the family has none.
        experts: where the experts are in memory; None where the family has none.
        layer_end: what happens after the MLP; None for nothing.
        output_bias: of `attention_output` and `mlp_output`, what makes the family load a bias that it lacks.
        disk: tensor names in a checkpoint.
    """

    family: str
    model_types: tuple[str, ...] = Field(min_length=1)
    numbers: Numbers
    defaults: dict[str, bool | int | float] = Field(default_factory=dict)
    model: ModelParts
    layer: LayerParts
    attention_contribution: Contributes
    mlp_contribution: Contributes
    mlp_layers: Literal["all", "as_found"]
    linear_layer: LinearParts | None = None
    experts: Experts | None = None
    layer_end: LayerEnd | None = None
    output_bias: dict[Literal["attention_output", "mlp_output"], OutputBias] = Field(default_factory=dict)
    disk: Disk


def read_record(path: str | Path) -> Record:
    """Read a record from a YAML file.

    Raises:
        SteerError: the file is missing, no YAML, or has unknown, missing or unfit keys; every one is named.
    """
    path = Path(path)
    if not path.is_file():
        raise SteerError(
            f"there is no anatomy record {str(path)!r}",
            "a YAML file",
            f"Start from a copy of one of {', '.join(families())} in {FAMILIES.name}/",
        )
    try:
        return Record.model_validate(_bundled_text(path) if path.parent == FAMILIES else yaml_text.load(path))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors()
        )
        raise SteerError(
            f"the anatomy record {path} does not fit: {problems}",
            "the keys of docs/anatomy.md",
            "Correct the keys named here",
        ) from error


def _bundled_text(path: Path) -> Any:
    """Read a file of ours, fast; what others write is read with more care."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def families() -> tuple[str, ...]:
    """Names of the bundled records."""
    return tuple(sorted(path.stem for path in FAMILIES.glob("*.yaml")))


@cache
def _by_model_type() -> dict[str, Path]:
    """Which bundled record describes each `model_type`; a record's file is read only when it is wanted."""
    return {name: FAMILIES / f"{name}.yaml" for name in families()}


def bundled(model_type: str) -> Record | None:
    """Return the bundled record for a `model_type`, or None."""
    path = _by_model_type().get(model_type)
    return None if path is None else read_record(path)
