"""Shapes of experts that are packed as MXFP4, as if they were plain; imports neither torch nor transformers.

gpt_oss stores `X_blocks` (experts, out, blocks of 32 numbers, 16 bytes) and `X_scales` (experts, out, blocks of 32
numbers) where a plain checkpoint has `X` (experts, in, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

METHOD = "mxfp4"
"""`quant_method` of config.json."""
BLOCKS, SCALES = "_blocks", "_scales"


def shapes_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, unpacked where its configuration says MXFP4."""
    quantised = config.get("quantization_config")
    packed = isinstance(quantised, Mapping) and quantised.get("quant_method") == METHOD
    return unpacked(shapes) if packed else shapes


def unpacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return all shapes, and for every `X_blocks` that of the plain `X` where there is none."""
    found = dict(shapes)
    for name, shape in shapes.items():
        if name.endswith(BLOCKS) and len(shape) > 2:
            experts, out, *packed_in = shape
            found.setdefault(name.removesuffix(BLOCKS), (experts, 2 * math.prod(packed_in), out))
    return found
