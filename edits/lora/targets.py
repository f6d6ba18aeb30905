"""Which matrices an adapter of PEFT can reach in a model of transformers 5, and under which name.

Asked of the model itself, built without a byte of weights on the meta device, so that no list of module names has to be
kept: a `Linear` is a target module, an `Embedding` has factors of its own kind, the fused experts are target
parameters. What is none of these (norms, routers, biases, convolutions) is refused with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import Matrix
from steer.errors import SteerError

Kind = Literal["linear", "weight", "embedding", "experts"]

# PEFT 0.21 takes these names in a model with experts for the experts of transformers 4 and wraps all experts instead; a
# projection outside the experts that bears one of them is targeted as a parameter.
TAKEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True, order=True)
class Place:
    """Where PEFT puts the factors of one matrix.

    Attributes:
        path: of the module that is wrapped.
        kind: `linear` and `embedding` are target modules; `weight` and `experts` parameters of the module.
        parameter: name of the parameter in the module.
        experts: how many share the factors; 0 for one matrix.
        expert: index of this one.
        out: rows of the whole matrix that the factors make, gate and up together.
        rows: start, stop and step of this matrix in them; None for all.
    """

    path: str
    kind: Kind
    parameter: str = "weight"
    experts: int = 0
    expert: int = 0
    out: int = 0
    rows: tuple[int, int | None, int] | None = None

    @property
    def whole(self) -> Place:
        """The place without the expert: one pair of factors in the file."""
        return Place(self.path, self.kind, self.parameter, self.experts, out=self.out)

    @property
    def target(self) -> str:
        """What the configuration names."""
        return self.path if self.kind in ("linear", "embedding") else f"{self.path}.{self.parameter}"


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        anatomy: of the checkpoint.
        modules: every module by its path.
        routers: names of the routers' weights.
    """

    anatomy: Anatomy
    modules: Mapping[str, nn.Module]
    routers: frozenset[str]


def skeleton(folder: Path, anatomy: Anatomy) -> Skeleton:
    """Build the model of a checkpoint folder on the meta device, as transformers would load it.

    Raises:
        SteerError: transformers does not know the family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = make(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise SteerError(
            f"transformers cannot build the model of {folder} ({error})",
            "a family that it knows, since PEFT wraps its modules",
            "Use the patch itself: `steer apply`",
        ) from error
    routers = frozenset(anatomy.in_memory(router).name for router in anatomy.matrices("router"))
    return Skeleton(anatomy, dict(model.named_modules()), routers)


def place_of(matrix: Matrix, model: Skeleton) -> Place | str:
    """Return where PEFT puts the factors of a matrix, or why it cannot."""
    anatomy = model.anatomy
    if matrix.bias:
        return "an adapter is a product with the input and holds no bias"
    if matrix.module in ("embedding", "head") and anatomy.tied:
        return "embedding and head are tied, and PEFT would change only one of them"
    slot = anatomy.in_memory(matrix)
    path, _, parameter = slot.name.rpartition(".")
    module = model.modules.get(path)
    if module is None:
        return f"transformers has no module {path}"
    if slot.name in model.routers:
        return "PEFT cannot wrap a router"
    if slot.expert is not None:
        if bool(getattr(module, "is_transposed", False)) != slot.transposed:
            return "PEFT would turn its factors round"
        shape = slot_shape(module, parameter)
        out = shape[2] if slot.transposed else shape[1]
        return Place(path, "experts", parameter, shape[0], slot.expert, out, slot.rows)
    if parameter == "weight" and slot.rows is None:
        out = slot_shape(module, parameter)[0]
        if isinstance(module, nn.Linear):
            clash = bool(anatomy.experts) and path.rpartition(".")[2] in TAKEN
            return Place(path, "weight" if clash else "linear", out=out)
        if isinstance(module, nn.Embedding):
            return Place(path, "embedding", out=module.embedding_dim)
    if len(slot_shape(module, parameter)) == 3:
        return "it holds all experts at once, which have factors each"
    return f"PEFT wraps no {parameter} of a {type(module).__name__}"


def slot_shape(module: nn.Module, parameter: str) -> tuple[int, ...]:
    """Return the shape of a parameter."""
    return tuple(getattr(module, parameter).shape)
