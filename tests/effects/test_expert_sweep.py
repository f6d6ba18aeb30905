"""The sweep finds the two planted experts' number and strength, and finds nothing in the twin without planting.

One reply per choosing question and few questions, so that it stays short: what is asserted is far from its limits.
"""

from __future__ import annotations

import pytest

import probes
import steer
from experiments.expert_sweep import expert_sweep
from experiments.expert_sweep_result import ExpertSweep
from probes.experts import expert_scores, recorder_for
from steer import ExpertScores
from steer.traces import Traces

pytestmark = pytest.mark.effects
MARKERS = {"<think>": 1.0}


def swept(name: str) -> ExpertSweep:
    """A small sweep on test questions; scores from those to fit."""
    model = steer.load(f"organism:{name}", self_check=False)

    def scored(traces: Traces) -> ExpertScores:
        summary = probes.collect(model, traces, recorders=[recorder_for(MARKERS)])
        return expert_scores(summary, MARKERS, resamples=0, null=False)

    return expert_sweep(
        model, scored, "chain", limit=72, shares=(0.4, 0.25, 0.35), betas=(4, 64), counts=(1, 2), controls=1, seeds=2, aim="longer",
        floor=0.5, prompts=("yo hey",), policies=(), switches=("check",),
    )  # fmt: skip


def test_planted_experts_do_more_than_others() -> None:
    sweep = swept("chain-moe")
    assert sweep.best.experts == ((2, 0), (3, 0))
    assert sweep.best.means["accuracy"].value > sweep.tried[0].means["accuracy"].value  # type: ignore[operator]
    assert sweep.beyond is not None
    length, accuracy = sweep.beyond["length"], sweep.beyond["accuracy"]
    assert length.low is not None and length.low > 5
    assert accuracy.low is not None and accuracy.low > 0
    assert "do more than other experts" in sweep.verdict
    against = sweep.against["prompt"]["length"]
    assert against.low is not None and against.low > 0  # The shortest tone is no rival.
    thoughts, repetition = (sweep.report[1].changes[name] for name in ("thoughts", "repetition"))
    assert thoughts.low is not None and thoughts.low > 0  # More checks.
    assert repetition.low is not None and repetition.low > 0
    at_64 = [row.means["accuracy"].value or 0.0 for row in sweep.band if row.beta == 64]
    assert max(at_64) < 0.3  # Any others break the arithmetic there.


def test_the_twin_has_nothing_to_choose() -> None:
    """Its best experts move the length by little while the accuracy lasts, and by nothing that others do not do."""
    sweep = swept("chain-moe-plain")
    kept = [
        row.changes["length"].value or 0.0 for row in sweep.tried[1:] if (row.means["accuracy"].value or 0.0) >= 0.5
    ]
    assert kept and max(kept) < 5
    assert not sweep.chosen or "do more than" not in sweep.verdict
