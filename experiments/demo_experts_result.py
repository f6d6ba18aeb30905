"""What the demo on the mixture of experts found, and its plain form: the object that `steer demo --moe --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import expert_wording, wording
from experiments.changes import Change, beyond, closed_share, figures, short_share, standing
from experiments.run import Run
from steer.intervals import Interval

if TYPE_CHECKING:
    from edits.agreement import Agreement
    from experiments.demo_experts import ExpertPlan
    from steer.expert_interventions import Expert
    from steer.expert_scores import ExpertScores


@dataclass(frozen=True)
class Scaled:
    """Some experts, and what became of the model as their weights were multiplied.

    Attributes:
        name: for the reader.
        kind: "found", "random", "matched" or "twin".
        experts: (layer, expert) pairs.
        betas: increasing, 1 among them.
        runs: on the same test questions, one per beta; at 1 the unchanged model.
    """

    name: str
    kind: str
    experts: tuple[Expert, ...]
    betas: tuple[float, ...]
    runs: tuple[Run, ...]

    def at(self, beta: float) -> Run:
        """The run at a beta."""
        return self.runs[self.betas.index(beta)]

    @property
    def plain(self) -> Run:
        """The unchanged model."""
        return self.at(1.0)


@dataclass(frozen=True)
class Twin:
    """The negative control: trained alike, nothing planted.

    Attributes:
        model: its name.
        scores: of its experts, made as the others.
        own: its best experts by these scores, scaled.
    """

    model: str
    scores: ExpertScores
    own: Scaled


@dataclass(frozen=True)
class ExpertDemoResult:
    """Everything the demo found.

    Attributes:
        out: the folder of all files.
        model: name of the organism.
        base_checkpoint: its folder.
        card: its card.
        plan: what was done.
        seed: of sampling and random pairs.
        baseline, fit: the unchanged model on test and on fit questions.
        scores: of every expert, from the fit replies.
        found: the best experts by these scores, scaled.
        controls: other pairs, scaled; the one of equal frequency last.
        edited: the checkpoint on the test questions.
        agreement: of the hook form with the checkpoint.
        twin: the negative control.
        seconds: wall time of everything up to the report.
    """

    out: Path
    model: str
    base_checkpoint: Path
    card: Mapping[str, Any]
    plan: ExpertPlan
    seed: int
    baseline: Run
    fit: Run
    scores: ExpertScores
    found: Scaled
    controls: tuple[Scaled, ...]
    edited: Run
    agreement: Agreement
    twin: Twin
    seconds: float

    @property
    def checkpoint(self) -> Path:
        """The edited checkpoint."""
        return self.out / "checkpoint"

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.html"

    @property
    def planted(self) -> tuple[Expert, ...]:
        """The experts that were planted, by the card; empty where nothing was."""
        planting = self.card.get("planted") or {}
        return tuple((int(layer), int(expert)) for layer, expert in planting.get("experts", ()))

    @cached_property
    def same_replies(self) -> int:
        """How many replies of the checkpoint are those of the hook, token for token."""
        pairs = zip(self.edited.traces, self.found.at(self.plan.edited).traces, strict=True)
        return sum(one.completion_token_ids == other.completion_token_ids for one, other in pairs)

    @cached_property
    def _changes(self) -> dict[tuple[str, float], Change]:
        return {}

    def change(self, scaled: Scaled, beta: float) -> Change:
        """What a beta changed against the unchanged model of these experts, questions paired."""
        if (scaled.name, beta) not in self._changes:
            self._changes[scaled.name, beta] = Change.between(scaled.plain, scaled.at(beta), self.seed)
        return self._changes[scaled.name, beta]

    def beyond(self, beta: float) -> Interval:
        """How far the accuracy with the experts found lies above the mean of the other pairs, at one beta."""
        return beyond(self.found.at(beta), [control.at(beta) for control in self.controls], self.seed)

    def sentences(self) -> tuple[str, ...]:
        """The findings in plain words, a paragraph each, in the order of the work."""
        return (
            wording.baseline(self.model, self.baseline),
            expert_wording.finding(self),
            expert_wording.scaling(self),
            expert_wording.controls(self),
            expert_wording.editing(self),
            wording.verification(self.agreement),
            expert_wording.twin(self),
            expert_wording.RICE,
        )

    def to_dict(self) -> dict[str, Any]:
        """The object of `steer demo --moe --json`; paths are relative to where the demo was called if `out` is."""
        return {
            "model": self.model,
            "base_checkpoint": str(self.base_checkpoint),
            "baseline": standing(self.baseline),
            "experts": {**_told(self.scores, self.plan), "planted": [list(expert) for expert in self.planted]},
            "scaling": self._scaling(),
            "patch": {
                "experts": [list(expert) for expert in self.found.experts],
                "beta": self.plan.edited,
                "accuracy_before": self.baseline.accuracy,
                "accuracy_after": self.edited.accuracy,
                "short_share_before": short_share(self.baseline),
                "short_share_after": short_share(self.edited),
                "change": Change.between(self.baseline, self.edited, self.seed).to_dict(),
                "replies": len(self.edited.traces),
                "replies_as_the_hook": self.same_replies,
            },
            "verify": {
                "bytes_equal": self.agreement.bytes_equal,
                "max_abs_logit_difference": self.agreement.max_abs_logit_difference,
                "floor": self.agreement.floor,
                "tolerance": self.agreement.tolerance,
                "passed": self.agreement.passed,
            },
            "twin": {
                "model": self.twin.model,
                "baseline": standing(self.twin.own.plain),
                "experts": _told(self.twin.scores, self.plan),
                "scaling": self._one(self.twin.own),
            },
            "checkpoint": str(self.checkpoint),
            "report": str(self.report),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
        }

    def _scaling(self) -> dict[str, Any]:
        shared = [beta for beta in self.plan.control_betas if beta in self.plan.betas and beta != 1]
        return {
            **self._one(self.found),
            "controls": [self._one(control) for control in self.controls],
            "accuracy_beyond_controls": {f"{beta:g}": self.beyond(beta).to_dict() for beta in shared},
        }

    def _one(self, scaled: Scaled) -> dict[str, Any]:
        return {
            "name": scaled.name,
            "kind": scaled.kind,
            "experts": [list(expert) for expert in scaled.experts],
            "betas": list(scaled.betas),
            "accuracy": [run.accuracy for run in scaled.runs],
            "mean_thinking_tokens": [run.mean_thinking_tokens for run in scaled.runs],
            "short_share": [short_share(run) for run in scaled.runs],
            "closed_share": [closed_share(run) for run in scaled.runs],
            "intervals": [figures(run) for run in scaled.runs],
            "changes": [self.change(scaled, beta).to_dict() for beta in scaled.betas],
        }


def _told(scores: ExpertScores, plan: ExpertPlan) -> dict[str, Any]:
    """Every score with what is known of it, and what was counted."""
    return {
        "method": scores.method,
        "formula": scores.formula,
        "tokens": scores.tokens,
        "markers": [{"text": each.text, "sign": each.sign, "tokens": each.marked} for each in scores.markers],
        "chosen": [list(expert) for expert in scores.top(plan.experts)],
        "ties": [list(expert) for expert in scores.ties(plan.experts)],
        "rows": scores.rows(),
    }
