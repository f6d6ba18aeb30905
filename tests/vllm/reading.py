"""What is read in the lane, by both sides."""

from __future__ import annotations

import torch

from probes.collect.means import SpanMeans
from probes.collect.recorders import Recorder
from probes.collect.routing import RouterCounts
from steer import Add, Direction, ScaleExperts, Steering
from steer.model import SteerableModel

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SPANS = ("predicts_thinking", "thinking", "answer", "marker:;@all")
STRENGTH = 0.5


def recorders(model: SteerableModel) -> list[Recorder]:
    """Means at every site that vLLM reads, and of a mixture of experts their choices."""
    means: list[Recorder] = [SpanMeans(SITES, SPANS)]
    return [*means, RouterCounts(("all", "thinking", "marker:<think>@all"))] if model.anatomy.expert_layers else means


def steering(model: SteerableModel) -> Steering:
    """Changes that act between marks, at every site that vLLM writes, and on experts where there are any."""
    random = torch.Generator().manual_seed(7)

    def add(site: str, layer: int, phase: str) -> Add:
        vector = torch.randn(1, model.anatomy.hidden, generator=random)
        return Add(Direction(2 * vector / vector.norm(), (layer,), site), site, phase=phase)

    changes = (add("resid_mid", 1, "thinking"), add("mlp_out", 1, "all"), add("resid_post", 2, "answer"))
    experts = model.anatomy.expert_layers
    return Steering(
        (*changes, ScaleExperts(((experts[0], 1), (experts[0], 2)), 4.0, phase="thinking")) if experts else changes
    )
