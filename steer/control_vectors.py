"""Control vectors of llama.cpp and repeng: a steering that adds vectors to the residual stream, as one GGUF file.

The file holds a tensor `direction.L` (hidden,) in float32 per layer, which is added to what layer L, counted from 0,
returns: `Add` at `resid_post` in phase `all`. Several additions in one layer become their sum. llama.cpp has no place
for layer 0, and multiplies the file by the number given with `--control-vector-scaled FILE SCALE`, our coefficient.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.files import replacing
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
    if find_spec("gguf") is None:
        raise SteerError("the package `gguf` is not installed", "", "Run `pip install 'reasoning-steer[gguf]'`")
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
