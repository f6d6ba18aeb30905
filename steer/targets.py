"""What a change is held against before it runs: a loaded model, or the headers of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor

from steer.anatomy.headers import Headers, read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix
from steer.form_table import Bias
from steer.identity import ModelIdentity, shape_id
from steer.parameters import place
from steer.sources import locate
from steer.weights import weights_id
from steer.writers import has_bias

if TYPE_CHECKING:
    from steer.model import SteerableModel

PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Target:
    """A model as far as a change needs to know it.

    Attributes:
        anatomy: its parts and counts.
        identity: its name and shape, and its weights where they are known.
        quantised: the method, empty for plain weights.
        bias: returns the bias that goes with a matrix, None where there is none.
    """

    anatomy: Anatomy
    identity: ModelIdentity
    quantised: str
    bias: Bias


def target_of(model_or_path: SteerableModel | str | Path) -> Target:
    """Return the target for a loaded model or for a checkpoint, of which headers are read.

    Args:
        model_or_path: a loaded model, a checkpoint folder, or a name that `steer.load` takes.

    Raises:
        SteerError: there is no such checkpoint, or none of a known family.
    """
    if isinstance(model_or_path, str):
        return _of_headers(read_headers(locate(model_or_path).folder), model_or_path)
    if isinstance(model_or_path, Path):
        return _of_headers(read_headers(model_or_path), str(model_or_path))
    return _of_model(model_or_path)


def _of_headers(headers: Headers, name: str) -> Target:
    anatomy = resolve(headers.config, shapes_of(headers.config, headers.shapes))
    known = weights_id(headers.folder, headers.files)
    identity = ModelIdentity(name, anatomy.family, shape_id(anatomy.numbers()), known)
    odd = sorted(
        {headers.tensors[anatomy.disk_name(module, layer)].dtype for module, layer in anatomy.shapes} - set(PLAIN)
    )

    def bias(matrix: Matrix) -> Tensor | None:
        if not has_bias(anatomy, matrix):
            return None
        slot = anatomy.on_disk(replace(matrix, bias=True))
        with safe_open(headers.folder / headers.tensors[slot.name].file, framework="pt") as file:
            found: Tensor = slot.view(file.get_tensor(slot.name))[:, 0]
        return found

    return Target(anatomy, identity, _method(headers.config) or ", ".join(odd), bias)


def _of_model(model: SteerableModel) -> Target:
    def bias(matrix: Matrix) -> Tensor | None:
        if not has_bias(model.anatomy, matrix):
            return None
        where = place(model, replace(matrix, bias=True))
        found: Tensor | None = None if where.parameter is None else where.slot.view(where.parameter)[:, 0]
        return found

    return Target(model.anatomy, model.identity, _method(model.hf.config.to_dict()), bias)


def _method(config: dict[str, object]) -> str:
    found = config.get("quantization_config")
    return str(found.get("quant_method", "unknown method")) if isinstance(found, dict) else ""
