"""What the demo found, and its plain form: the object that `steer demo --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import probe_wording, wording
from experiments.changes import Change, beyond, closed_share, figures, short_share, standing
from experiments.curve import Curve
from experiments.run import Run
from steer.intervals import Interval

if TYPE_CHECKING:
    from edits.agreement import Agreement
    from experiments.demo import Plan
    from experiments.demo_probes import Probed
    from steer.directions import Direction
    from steer.scores import HeadScores

Heads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Edit:
    """An edit of some heads and what became of the model.

    Attributes:
        name: for the reader.
        heads: (layer, head) pairs.
        run: on the test questions.
        kind: "thinkedit", "other span", "random heads" or "random direction".
    """

    name: str
    heads: Heads
    run: Run
    kind: str = "thinkedit"


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Attributes:
        out: the folder of all files.
        model: name of the organism.
        base_checkpoint: its folder.
        card: its card.
        plan: what was done.
        seed: of sampling and controls.
        baseline, fit: the unchanged model on test and on fit questions.
        curve, controls: steering with the length direction and with random ones.
        direction, scores: as used.
        probed: how far these two can be trusted, and what the steering does beside what it is for.
        edits: ThinkEdit first, then the other span, random heads, a random direction.
        agreement: of the hook form with the checkpoint.
        seconds: wall time of everything up to the report.
    """

    out: Path
    model: str
    base_checkpoint: Path
    card: Mapping[str, Any]
    plan: Plan
    seed: int
    baseline: Run
    fit: Run
    curve: Curve
    controls: tuple[Curve, ...]
    direction: Direction
    scores: HeadScores
    probed: Probed
    edits: tuple[Edit, ...]
    agreement: Agreement
    seconds: float

    @property
    def edit(self) -> Edit:
        """The ThinkEdit whose checkpoint was written."""
        return self.edits[0]

    @property
    def checkpoint(self) -> Path:
        """The edited checkpoint."""
        return self.out / "checkpoint"

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.html"

    @cached_property
    def random_heads(self) -> tuple[Edit, ...]:
        """The edits of random heads."""
        return tuple(edit for edit in self.edits if edit.kind == "random heads")

    def change(self, edit: Edit) -> Change:
        """What an edit changed against the unchanged model, questions paired."""
        return Change.between(self.baseline, edit.run, self.seed)

    def beyond_random_heads(self) -> Interval:
        """How much more accuracy ThinkEdit gained than random heads did."""
        return beyond(self.edit.run, [edit.run for edit in self.random_heads], self.seed)

    def sentences(self) -> tuple[str, ...]:
        """The findings in plain words, a paragraph each, in the order of the work."""
        return (
            wording.baseline(self.model, self.baseline),
            probe_wording.direction(self),
            wording.steering(self),
            probe_wording.side_effects(self),
            probe_wording.heads(self),
            wording.editing(self),
            wording.verification(self.agreement),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object of `steer demo --json`; paths are relative to where the demo was called if `out` is."""
        change = self.change(self.edit)
        before, after = self.baseline, self.edit.run
        return {
            "model": self.model,
            "base_checkpoint": str(self.base_checkpoint),
            "baseline": standing(before),
            "steering": self._steering(),
            **self.probed.to_dict(),
            "thinkedit": {
                "heads": [[layer, head, self.scores[layer, head]] for layer, head in self.edit.heads],
                "short_share_before": short_share(before),
                "short_share_after": short_share(after),
                "accuracy_before": before.accuracy,
                "accuracy_after": after.accuracy,
                "control_accuracy_after": float(np.mean([edit.run.accuracy for edit in self.random_heads])),
                "change": change.to_dict(),
                "accuracy_beyond_random_heads": self.beyond_random_heads().to_dict(),
                "edits": [self._edit(edit) for edit in self.edits],
            },
            "verify": {
                "bytes_equal": self.agreement.bytes_equal,
                "max_abs_logit_difference": self.agreement.max_abs_logit_difference,
                "floor": self.agreement.floor,
                "tolerance": self.agreement.tolerance,
                "passed": self.agreement.passed,
            },
            "checkpoint": str(self.checkpoint),
            "report": str(self.report),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
        }

    def _steering(self) -> dict[str, Any]:
        by_draw = [control.lengths for control in self.controls]
        return {
            "coefficients": list(self.curve.coefficients),
            "mean_thinking_tokens": self.curve.lengths,
            "accuracy": self.curve.accuracies,
            "control_mean_thinking_tokens": [_mean(column) for column in zip(*by_draw, strict=True)],
            "closed_share": [closed_share(run) for run in self.curve.runs],
            "short_share": [short_share(run) for run in self.curve.runs],
            "control_accuracy": [
                _mean(column) for column in zip(*(control.accuracies for control in self.controls), strict=True)
            ],
            "control_mean_thinking_tokens_by_draw": by_draw,
            "intervals": [figures(run) for run in self.curve.runs],
            "slope": self.curve.slope(self.seed).to_dict(),
            "control_slopes": [control.slope(self.seed).to_dict() for control in self.controls],
            "slope_beyond_controls": self.curve.slope_beyond(self.controls, self.seed).to_dict(),
            "length_ratio": self.curve.ratio(self.seed).to_dict(),
            "site": self.plan.site,
            "layers": list(self.plan.layers),
            "span": self.plan.span,
        }

    def _edit(self, edit: Edit) -> dict[str, Any]:
        return {
            "name": edit.name,
            "kind": edit.kind,
            "heads": [list(head) for head in edit.heads],
            "accuracy": edit.run.accuracy,
            "short_share": short_share(edit.run),
            "mean_thinking_tokens": edit.run.mean_thinking_tokens,
            "closed_share": closed_share(edit.run),
            "change": self.change(edit).to_dict(),
        }


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
