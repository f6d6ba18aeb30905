"""Control vectors of llama.cpp and repeng: a steering that adds vectors to the residual stream, as one GGUF file.

The file holds a tensor `direction.L` (hidden,) in float32 per layer, which is added to what layer L, counted from 0,
returns: `Add` at `resid_post` in phase `all`. Several additions in one layer become their sum. llama.cpp has no place
for layer 0, and multiplies the file by the number given with `--control-vector-scaled FILE SCALE`, our coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.directions import Direction
from steer.errors import SteerError
from steer.files import replacing
from steer.identity import ModelIdentity
from steer.interventions import Add
from steer.steering import Steering

ARCHITECTURE = "controlvector"


def vectors(steering: Steering) -> dict[int, Float[Tensor, " hidden"]]:
    """Return what a steering adds to the output of each layer, float32, layers in order.

    Raises:
        SteerError: it does something else than add to the residual stream behind layers 1 and later, at every token.
    """
    found: dict[int, Tensor] = {}
    for each in steering.interventions:
        what = f"{type(each).__name__} at {each.site} in phase {each.phase}"
        if not isinstance(each, Add) or each.site != "resid_post" or each.phase != "all":
            raise SteerError(
                f"{what} cannot be said by a control vector",
                "Add at resid_post in phase all",
                "Build the steering at resid_post; where it has a patch form, `steer apply` writes a checkpoint for any engine",
            )
        for layer in each.active_layers:
            added = each.coefficient * each.direction[layer].double()
            found[layer] = found[layer] + added if layer in found else added
    if 0 in found:
        raise SteerError(
            "the steering adds a vector behind layer 0, for which llama.cpp has no place",
            "layers 1 and later",
            "Leave layer 0 out: Add(direction, 'resid_post', layers=(1, 2, ...))",
        )
    return {layer: found[layer].to(torch.float32) for layer in sorted(found)}


def write(steering: Steering, path: str | Path, overwrite: bool = False) -> dict[int, float]:
    """Write a steering as a control vector.

    Args:
        steering: see `vectors`.
        path: a name that ends in `.gguf`.
        overwrite: allow `path` to exist.

    Returns:
        The norm of the vector of every layer.

    Raises:
        SteerError: as `vectors`; the package `gguf` is missing; another ending; `path` exists.
        OSError: the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise SteerError(f"the name {path.name!r} does not end in .gguf", "a .gguf file", "Add the ending")
    _require_gguf()
    from gguf import GGUFWriter

    added = vectors(steering)
    with replacing(path, overwrite) as partial:
        writer = GGUFWriter(partial, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", "" if steering.model is None else steering.model.family)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(added))
        for layer, vector in added.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {layer: float(vector.double().norm()) for layer, vector in added.items()}


def read(path: str | Path, model: ModelIdentity | None = None) -> Direction:
    """Read a control vector of llama.cpp or repeng as a direction at `resid_post`.

    Args:
        path: a `.gguf` file with tensors `direction.L`.
        model: recorded in the direction; the file only hints at a family.

    Raises:
        SteerError: no such file, not a control vector, a tensor of another name, vectors that differ in width, or the
            package `gguf` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise SteerError(f"there is no file {path}", "a control vector", "Check the path")
    _require_gguf()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        named = reader.get_field("general.architecture")
        architecture = None if named is None else named.contents()
        rows = {tensor.name: _numbers(tensor) for tensor in reader.tensors}
    except (ValueError, OSError, IndexError, KeyError, RuntimeError) as error:
        raise SteerError(
            f"{path} is no GGUF file, or damaged ({error})", "a control vector of llama.cpp or repeng"
        ) from error
    if architecture != ARCHITECTURE:
        raise SteerError(
            f"{path} holds {architecture!r}",
            f"the architecture {ARCHITECTURE!r}",
            "A model is loaded by its name, not imported",
        )
    return from_layers(
        {_layer_of(name, path): vector for name, vector in rows.items()}, model, f"control vector {path.name}"
    )


def from_layers(vectors: Mapping[int, Any], model: ModelIdentity | None = None, source: str = "repeng") -> Direction:
    """Return vectors by layer, as repeng keeps them in `ControlVector.directions`, as a direction at `resid_post`.

    Args:
        vectors: layer, counted from 0 -> (hidden,), added to what the layer returns.
        model: recorded in the direction.
        source: recorded in its provenance.

    Raises:
        SteerError: there is none, or they differ in width.
    """
    layers = tuple(sorted(vectors))
    widths = {int(np.asarray(vectors[layer]).size) for layer in layers}
    if len(widths) != 1:
        raise SteerError(f"the vectors have the widths {sorted(widths)}", "at least one vector, all of one width")
    stacked = np.stack([np.asarray(vectors[layer], dtype=np.float32).reshape(-1) for layer in layers])
    return Direction(torch.from_numpy(stacked), layers, "resid_post", model, {"convention": f"imported: {source}"})


def _numbers(tensor: Any) -> Float[Tensor, " hidden"]:
    """The numbers of a tensor; of bfloat16 and quantised ones the package hands out bytes."""
    from gguf.quants import dequantize

    data = np.asarray(tensor.data)
    plain = data if np.issubdtype(data.dtype, np.floating) else dequantize(data, tensor.tensor_type)
    return torch.from_numpy(np.array(plain, dtype=np.float32)).reshape(-1)


def _layer_of(name: str, path: Path) -> int:
    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isdecimal():
        raise SteerError(f"{path} holds the tensor {name!r}", "tensors direction.1, direction.2, …")
    return int(number)


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise SteerError("the package `gguf` is not installed", "", "Run `pip install 'reasoning-steer[gguf]'`")
