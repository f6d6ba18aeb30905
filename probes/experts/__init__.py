"""Which experts fire with thinking: counts at marker tokens, scores, intervals and chances (RICE, arXiv 2505.14681)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from probes.experts.between import expert_differences as expert_differences
    from probes.experts.counts import MARKERS as MARKERS
    from probes.experts.counts import recorder_for as recorder_for
    from probes.experts.formulas import METHODS as METHODS
    from probes.experts.routed import from_routed as from_routed
    from probes.experts.score import expert_scores as expert_scores

export(
    __name__,
    {
        "MARKERS": "probes.experts.counts",
        "METHODS": "probes.experts.formulas",
        "expert_differences": "probes.experts.between",
        "expert_scores": "probes.experts.score",
        "from_routed": "probes.experts.routed",
        "recorder_for": "probes.experts.counts",
    },
)
