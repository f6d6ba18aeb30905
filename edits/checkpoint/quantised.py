"""Quantised checkpoints: which tensors are packed, what shape they stand for, and what to do instead of editing them.

| format | beside or instead of `X.weight` |
|---|---|
| fp8 (fine-grained) | `X.weight` in F8_E4M3 with `X.weight_scale_inv` |
| compressed-tensors | `X.weight_packed`, `X.weight_scale`, `X.weight_zero_point` |
| GPTQ, AWQ | `X.qweight`, `X.qzeros`, `X.scales`, GPTQ also `X.g_idx` |
| bitsandbytes | `X.weight` in U8 with `X.weight.absmax`, `X.weight.quant_map`, `X.weight.quant_state.*` |
| MXFP4 (gpt_oss) | `X_blocks`, `X_scales` |

Tensors of such a checkpoint that are not packed can be patched like any other. Of those that are, one kind of edit is
made: an expert in MXFP4 is scaled by a power of two in the exponents of its blocks (`steer.operations.exponents`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from steer.anatomy.headers import Entry, Headers
from steer.anatomy.packed import BLOCKS, SCALES, unpacked
from steer.anatomy.slots import EXPERTS, Matrix, Slot
from steer.errors import SteerError
from steer.operations import AddLowRank, Operation, ProjectColumns, Scale, exponents

_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|weight_shape|absmax|quant_map)$"
    r"|_(blocks|scales|scale_inv)$|\.quant_state\."
)
QUANTISED_REMEDY = "Patch the unquantised checkpoint and quantise the result, or use the hook form, `patch.steering()`"
LORA_REMEDY = (
    "Patch the unquantised checkpoint and quantise the result; or make an adapter from the unquantised model, "
    "`steer export PATCH --as lora --model UNQUANTISED --out F`, which runs on the quantised one too"
)
EXPERTS_REMEDY = (
    "Patch the unquantised checkpoint and quantise the result; or, where loading leaves the experts in plain tensors, use "
    "the hook form, `ScaleExperts`, which `steer patch experts … --steering FILE` writes"
)


def packed(tensors: Mapping[str, Entry]) -> list[str]:
    """Names of the tensors that belong to a packed weight."""
    return [name for name in tensors if _PACKED.search(name)]


def remedy(operations: Sequence[Operation]) -> str:
    """Return what to do instead: an adapter where every operation has factors and its target is a linear layer."""
    if operations and all(isinstance(each, Scale) and each.matrix.module in EXPERTS for each in operations):
        return EXPERTS_REMEDY
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


def block_exponents(matrix: Matrix, slot: Slot, operations: Sequence[Operation], headers: Headers) -> Slot | None:
    """Return where the block exponents of an expert in MXFP4 lie, if all that is done to it is to be scaled.

    Args:
        matrix: what is meant.
        slot: where it would lie if it were plain.
        operations: all that is done to it.
        headers: of the checkpoint.

    Raises:
        SteerError: a factor is no power of two.
    """
    scales = [each for each in operations if isinstance(each, Scale)]
    blocks, scales_ = (headers.tensors.get(slot.name + ending) for ending in (BLOCKS, SCALES))
    there = blocks is not None and scales_ is not None and scales_.dtype == "U8"
    if matrix.module not in EXPERTS or not there or len(scales) < len(operations):
        return None
    if (reason := exponents.refusal([each.effective for each in scales])) is not None:
        raise SteerError(f"{matrix} is to be scaled: {reason[0]}", "powers of two", reason[1])
    return Slot(f"{slot.name}{SCALES}", slot.expert, rows=slot.rows)


def stand_ins(headers: Headers) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, with `X.weight` for packed ones, so that the anatomy can be found.

    What a format does not say (bitsandbytes flattens) is worked out from the hidden size.
    """
    shapes = unpacked(headers.shapes)
    hidden = headers.config.get("hidden_size")
    for name, entry in headers.tensors.items():
        stem, _, kind = name.rpartition(".")
        weight = f"{stem}.weight"
        if kind == "qweight" and f"{stem}.scales" in shapes:
            inputs = shapes[f"{stem}.g_idx"][0] if f"{stem}.g_idx" in shapes else entry.shape[0]
            shapes.setdefault(weight, (shapes[f"{stem}.scales"][1], inputs))
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
