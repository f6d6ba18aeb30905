"""Read models: one streaming pass over traces, then pure functions on what it left behind.

`collect` reads a model over traces and leaves a `Summary`; `length_direction`, `head_scores` and `split_half` are
seconds on it. Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from probes.attention import ConstraintAttention as ConstraintAttention
    from probes.attention import constraint_attention as constraint_attention
    from probes.causal import CausalShare as CausalShare
    from probes.causal import causal_share as causal_share
    from probes.choose import choose as choose
    from probes.collect.attention import SpanAttention as SpanAttention
    from probes.collect.means import HeadMeans as HeadMeans
    from probes.collect.means import SpanMeans as SpanMeans
    from probes.collect.next_token import NextTokenStats as NextTokenStats
    from probes.collect.recorders import Recorder as Recorder
    from probes.collect.routing import RouterCounts as RouterCounts
    from probes.collect.run import collect as collect
    from probes.collect.run import plan as plan
    from probes.collect.segments import SegmentMeans as SegmentMeans
    from probes.collect.summary import Summary as Summary
    from probes.contrast import contrast_direction as contrast_direction
    from probes.directions import SplitHalf as SplitHalf
    from probes.directions import length_direction as length_direction
    from probes.directions import split_half as split_half
    from probes.effects.compare import Comparison as Comparison
    from probes.effects.compare import compare as compare
    from probes.effects.controls import random_control as random_control
    from probes.effects.loops import LoopRule as LoopRule
    from probes.effects.options import EffectOptions as EffectOptions
    from probes.effects.result import Effects as Effects
    from probes.effects.run import effects as effects
    from probes.efficiency import efficiency_direction as efficiency_direction
    from probes.efficiency import efficiency_steering as efficiency_steering
    from probes.experts.between import expert_differences as expert_differences
    from probes.experts.score import expert_scores as expert_scores
    from probes.heads import head_scores as head_scores
    from probes.lengths import LengthRule as LengthRule
    from probes.quality import Quality as Quality
    from probes.quality import quality as quality
    from probes.text import TextSignals as TextSignals
    from probes.text import text_signals as text_signals
    from probes.token_view import TokenView as TokenView
    from probes.token_view import token_view as token_view
    from probes.trajectory.compute import trajectory as trajectory
    from probes.trajectory.online import OnlineTrajectory as OnlineTrajectory
    from probes.trajectory.result import Trajectory as Trajectory
    from probes.trajectory.watch import watching as watching

export(
    __name__,
    {
        "OnlineTrajectory": "probes.trajectory.online",
        "Trajectory": "probes.trajectory.result",
        "trajectory": "probes.trajectory.compute",
        "watching": "probes.trajectory.watch",
        "CausalShare": "probes.causal",
        "causal_share": "probes.causal",
        "TextSignals": "probes.text",
        "text_signals": "probes.text",
        "TokenView": "probes.token_view",
        "token_view": "probes.token_view",
        "ConstraintAttention": "probes.attention",
        "HeadMeans": "probes.collect.means",
        "LengthRule": "probes.lengths",
        "Quality": "probes.quality",
        "choose": "probes.choose",
        "contrast_direction": "probes.contrast",
        "efficiency_direction": "probes.efficiency",
        "efficiency_steering": "probes.efficiency",
        "quality": "probes.quality",
        "Recorder": "probes.collect.recorders",
        "NextTokenStats": "probes.collect.next_token",
        "RouterCounts": "probes.collect.routing",
        "SegmentMeans": "probes.collect.segments",
        "SpanAttention": "probes.collect.attention",
        "SpanMeans": "probes.collect.means",
        "SplitHalf": "probes.directions",
        "Summary": "probes.collect.summary",
        "collect": "probes.collect.run",
        "constraint_attention": "probes.attention",
        "random_control": "probes.effects.controls",
        "effects": "probes.effects.run",
        "compare": "probes.effects.compare",
        "LoopRule": "probes.effects.loops",
        "Effects": "probes.effects.result",
        "EffectOptions": "probes.effects.options",
        "Comparison": "probes.effects.compare",
        "expert_differences": "probes.experts.between",
        "expert_scores": "probes.experts.score",
        "head_scores": "probes.heads",
        "length_direction": "probes.directions",
        "plan": "probes.collect.run",
        "split_half": "probes.directions",
    },
)
