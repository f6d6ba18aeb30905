"""Shapes of experts that are packed as MXFP4, as if they were plain; imports neither torch nor transformers.

gpt_oss stores `X_blocks` (experts, out, blocks of 32 numbers, 16 bytes) and `X_scales` (experts, out, blocks of 32
numbers) where a plain checkpoint has `X` (experts, in, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

BLOCKS, SCALES = "_blocks", "_scales"


def unpacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return all shapes, and for every `X_blocks` that of the plain `X` where there is none."""
    found = dict(shapes)
    for name, shape in shapes.items():
        if name.endswith(BLOCKS) and len(shape) > 2:
            experts, out, *packed_in = shape
            found.setdefault(name.removesuffix(BLOCKS), (experts, 2 * math.prod(packed_in), out))
    return found
