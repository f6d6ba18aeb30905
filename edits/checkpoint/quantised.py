"""Quantised checkpoints: which tensors are packed, what shape they stand for, and what to do instead of editing them.

| format | beside or instead of `X.weight` |
|---|---|
| fp8 (fine-grained) | `X.weight` in F8_E4M3 with `X.weight_scale_inv` |
| compressed-tensors | `X.weight_packed`, `X.weight_scale`, `X.weight_zero_point` |
| GPTQ, AWQ | `X.qweight`, `X.qzeros`, `X.scales`, GPTQ also `X.g_idx` |
| bitsandbytes | `X.weight` in U8 with `X.weight.absmax`, `X.weight.quant_map`, `X.weight.quant_state.*` |
| MXFP4 (gpt_oss) | `X_blocks`, `X_scales` |

Tensors of such a checkpoint that are not packed can be patched like any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from steer.anatomy.headers import Entry, Headers
from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations import AddLowRank, Operation, ProjectColumns

_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|weight_shape|absmax|quant_map)$"
    r"|_(blocks|scales|scale_inv)$|\.quant_state\."
)
QUANTISED_REMEDY = "Patch the unquantised checkpoint and quantise the result, or use the hook form, `patch.steering()`"
LORA_REMEDY = (
    "Patch the unquantised checkpoint and quantise the result; or make an adapter from the unquantised model, "
    "`steer export PATCH --as lora --model UNQUANTISED --out F`, which runs on the quantised one too"
)


def packed(tensors: Mapping[str, Entry]) -> list[str]:
    """Names of the tensors that belong to a packed weight."""
    return [name for name in tensors if _PACKED.search(name)]


def remedy(operations: Sequence[Operation]) -> str:
    """Return what to do instead: an adapter where every operation has factors and its target is a linear layer."""
    linear = all(
        isinstance(each, ProjectColumns | AddLowRank) and not each.matrix.bias and each.matrix.module != "embedding"
        for each in operations
    )
    return LORA_REMEDY if linear and operations else QUANTISED_REMEDY


def refuse(matrix: Matrix, name: str, operations: Sequence[Operation], headers: Headers) -> None:
    """Refuse a matrix whose stored tensor is packed.

    Raises:
        SteerError: it is; the message names the format's tensors and the remedy.
    """
    stem = name.removesuffix(".weight")
    found = [other for other in packed(headers.tensors) if other.startswith((stem + ".", stem + "_"))]
    if found or _PACKED.search(name):
        method = (headers.config.get("quantization_config") or {}).get("quant_method")
        how = f" ({method})" if method else ""
        raise SteerError(
            f"{matrix} is quantised on disk{how}: {headers.folder} holds {found[0] if found else name}",
            "a plain weight",
            remedy(operations),
        )


def stand_ins(headers: Headers) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, with `X.weight` for packed ones, so that the anatomy can be found.

    What a format does not say (bitsandbytes flattens) is worked out from the hidden size.
    """
    shapes = dict(headers.shapes)
    hidden = headers.config.get("hidden_size")
    for name, entry in headers.tensors.items():
        stem, _, kind = name.rpartition(".")
        weight = f"{stem}.weight"
        if kind == "qweight" and f"{stem}.scales" in shapes:
            inputs = shapes[f"{stem}.g_idx"][0] if f"{stem}.g_idx" in shapes else entry.shape[0]
            shapes.setdefault(weight, (shapes[f"{stem}.scales"][1], inputs))
        elif name.endswith("_blocks") and len(entry.shape) > 2:
            # 32 numbers in 16 bytes along the input; where they are plain, they are stored turned round.
            experts, out, *packed_in = entry.shape
            shapes.setdefault(name.removesuffix("_blocks"), (experts, 2 * math.prod(packed_in), out))
        elif kind == "weight_packed":
            bits = next(iter(_bits(headers.config)), 4)
            shapes.setdefault(weight, (entry.shape[0], entry.shape[1] * 32 // bits))
        elif kind == "weight" and entry.dtype == "U8" and f"{name}.absmax" in shapes and hidden:
            numbers = 2 * math.prod(entry.shape)
            shapes[name] = (hidden, numbers // hidden)
    return shapes


def _bits(config: Mapping[str, object]) -> list[int]:
    text = repr(config.get("quantization_config"))
    return [int(found) for found in re.findall(r"'num_bits': (\d+)", text)]
