"""Read models: one streaming pass over traces, then pure functions on what it left behind.

`collect` reads a model over traces and leaves a `Summary`; `length_direction`, `head_scores` and `split_half` are
seconds on it. Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from probes.collect.means import HeadMeans as HeadMeans
    from probes.collect.means import SpanMeans as SpanMeans
    from probes.collect.recorders import Recorder as Recorder
    from probes.collect.run import collect as collect
    from probes.collect.run import plan as plan
    from probes.collect.summary import Summary as Summary
    from probes.directions import SplitHalf as SplitHalf
    from probes.directions import length_direction as length_direction
    from probes.directions import split_half as split_half
    from probes.heads import head_scores as head_scores
    from probes.lengths import LengthRule as LengthRule

export(
    __name__,
    {
        "HeadMeans": "probes.collect.means",
        "LengthRule": "probes.lengths",
        "Recorder": "probes.collect.recorders",
        "SpanMeans": "probes.collect.means",
        "SplitHalf": "probes.directions",
        "Summary": "probes.collect.summary",
        "collect": "probes.collect.run",
        "head_scores": "probes.heads",
        "length_direction": "probes.directions",
        "plan": "probes.collect.run",
        "split_half": "probes.directions",
    },
)
