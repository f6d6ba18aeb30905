"""The loop on the mixture of experts: count, score, scale, compare with other pairs, edit, verify, and the twin.

Which experts go with the marks of thinking is counted on replies to fit questions, every figure comes from test questions.
Nothing is chosen here: the factors and the one that is written into the checkpoint are those of the paper (RICE, arXiv
2505.14681), the number of experts is its own too. What was planted stands in the organism's card, and is used for nothing but to say
whether it was found. The same is done to the twin, which was trained alike and has nothing planted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edits.agreement import Agreement
from edits.experts import expert_patch
from edits.verify import verify
from experiments.bench import PLAIN, RESULT, Bench, Tell, own_folder, refuse_existing
from experiments.demo_experts_result import ExpertDemoResult, Scaled, Twin
from experiments.run import Run
from probes.collect.run import collect
from probes.experts.counts import marks_as_markers, recorder_for
from probes.experts.score import expert_scores
from steer.errors import SteerError
from steer.expert_interventions import Expert, ScaleExperts
from steer.files import write_text
from steer.generation import Sampling
from steer.model import load
from steer.steering import Steering
from steer.threads import one_thread

if TYPE_CHECKING:
    from steer.expert_scores import ExpertScores
    from steer.model import SteerableModel

MODEL, TWIN = "organism:chain-moe", "organism:chain-moe-plain"
PAPER = 64.0


@dataclass(frozen=True)
class ExpertPlan:
    """What the demo does.

    Attributes:
        experts: how many are scaled together.
        betas: what their weights are multiplied by; 1 is the unchanged model.
        control_betas, twin_betas: the same for other pairs, and for the twin's own.
        edited: the beta that is written into a checkpoint; the paper's.
        mild: the beta at which other pairs are looked at first; not so strong that any pair does damage.
        questions: test questions per point, one reply each; whole shards of 64, since a step costs the same for few rows.
        fit_questions: what the counts are made from, one reply each.
        controls: random pairs, besides the one whose experts are chosen about as often as those that were found.
        resamples: of the questions, for the intervals of the scores.
        level: of the share of false discoveries.
    """

    experts: int = 2
    betas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
    control_betas: tuple[float, ...] = (0.0, 1.0, 4.0, 16.0, 64.0)
    twin_betas: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    edited: float = PAPER
    mild: float = 4.0
    questions: int = 192
    fit_questions: int = 192
    controls: int = 2
    resamples: int = 1000
    level: float = 0.05

    def __post_init__(self) -> None:
        for name in ("betas", "control_betas", "twin_betas"):
            found = getattr(self, name)
            if {1.0, self.mild} - {*found} or sorted(set(found)) != list(found):
                raise SteerError(
                    f"the plan's {name} are {found}", f"increasing factors, 1 and {self.mild:g} among them"
                )
        if self.edited not in self.betas or self.edited not in self.control_betas:
            raise SteerError(
                f"beta {self.edited:g} is to be edited in and never run as a hook", "one of betas and control_betas"
            )

    @property
    def steps(self) -> int:
        """How many evaluations and passes there are, for the progress."""
        scaled = [self.betas, *[self.control_betas] * (self.controls + 1), self.twin_betas]
        return 8 + sum(len(betas) - 1 for betas in scaled)


def demo_experts(
    out: str | Path,
    seed: int = 0,
    *,
    model: str = MODEL,
    twin: str = TWIN,
    plan: ExpertPlan | None = None,
    tell: Tell | None = None,
) -> ExpertDemoResult:
    """Run the whole loop and write everything into a new folder.

    Args:
        out: gets `report.html`, `result.json`, `checkpoint/`, `runs/`, and the scores, the steering and the patch.
        seed: of the sampling and of the random pairs.
        model: an organism with experts.
        twin: its negative control.
        plan: None takes the defaults.
        tell: called as the work goes on.

    Raises:
        SteerError: `out` exists, or one of the two is no organism with experts.
    """
    out = Path(out)
    refuse_existing(out)
    began = time.monotonic()
    with one_thread():  # So tiny a model is slower on several.
        base, other = load(model), load(twin)
        for each in (base, other):
            if each.card is None or not each.anatomy.expert_layers:
                raise SteerError(f"{each.name} is no organism with experts", f"{MODEL}, {TWIN}")
        return _demo(base, other, out, seed, plan or ExpertPlan(), tell or (lambda *_: None), began)


def _demo(
    base: SteerableModel, other: SteerableModel, out: Path, seed: int, plan: ExpertPlan, tell: Tell, began: float
) -> ExpertDemoResult:
    from experiments.expert_report import write_report

    own_folder(out, base.name, seed)
    bench = Bench(out, Sampling.of(base), seed, plan.questions, plan.steps, tell)
    baseline = bench.evaluate(base, PLAIN)
    fit, scores = _scored(bench, plan, base)
    best = scores.top(plan.experts)
    found = _scaled(bench, base, Scaled("the experts found", "found", best, plan.betas, (baseline,)), "found")
    controls = tuple(
        _scaled(bench, base, Scaled(name, kind, experts, plan.control_betas, (baseline,)), name.replace(" ", "-"))
        for name, kind, experts in _others(scores, best, plan, seed)
    )
    edited, agreement = _edited(bench, plan, base, scores)
    result = ExpertDemoResult(
        out=out,
        model=base.name,
        base_checkpoint=Path(base.path or "."),
        card=base.card or {},
        plan=plan,
        seed=seed,
        baseline=baseline,
        fit=fit,
        scores=scores,
        found=found,
        controls=controls,
        edited=edited,
        agreement=agreement,
        twin=_twin(bench, plan, other),
        seconds=time.monotonic() - began,
    )
    bench.report()
    write_report(result, out / "report.html")
    write_text(out / RESULT, json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def _scored(bench: Bench, plan: ExpertPlan, model: SteerableModel, prefix: str = "") -> tuple[Run, ExpertScores]:
    """Reply to fit questions, read the replies with their prompts, and score every expert."""
    fit = bench.evaluate(model, f"{prefix}fit", "chain:fit", plan.fit_questions)
    markers = marks_as_markers(model.marks, model.tokenizer)
    with bench.step(f"{prefix}read routing"):
        summary = collect(model, fit.traces, bench.out / f"{prefix}summary", recorders=[recorder_for(markers)])
        scores = expert_scores(summary, markers, resamples=plan.resamples, seed=bench.seed, model=model)
    scores.save(bench.out / f"{prefix}scores.safetensors")
    return fit, scores


def _others(
    scores: ExpertScores, best: tuple[Expert, ...], plan: ExpertPlan, seed: int
) -> Iterator[tuple[str, str, tuple[Expert, ...]]]:
    """Name, kind and experts of the other pairs, none of which shares an expert with another or with the best."""
    matched = scores.matched(best, seed=seed)
    taken = [*best, *matched]
    for draw in range(plan.controls):
        drawn = scores.random(len(best), 1000 * seed + draw, exclude=taken)
        taken += drawn
        yield f"random pair {draw + 1}", "random", drawn
    yield "matched pair", "matched", matched


def _scaled(bench: Bench, model: SteerableModel, begun: Scaled, name: str) -> Scaled:
    """Evaluate every factor but 1, whose run is given."""
    (plain,), runs = begun.runs, []
    for beta in begun.betas:
        if beta == 1:
            runs.append(plain)
        else:
            steering = Steering((ScaleExperts(begun.experts, beta),), model.identity, name)
            runs.append(bench.evaluate(model.with_(steering), f"{name}-x{beta:g}"))
    return Scaled(begun.name, begun.kind, begun.experts, begun.betas, tuple(runs))


def _edited(bench: Bench, plan: ExpertPlan, base: SteerableModel, scores: ExpertScores) -> tuple[Run, Agreement]:
    """Write the scaled experts as a checkpoint, verify it against the hook, and evaluate what was written."""
    best = scores.top(plan.experts)
    steering = Steering((ScaleExperts(best, plan.edited),), base.identity, "found")
    steering.save(bench.out / "steering.yaml")
    patch = expert_patch(best, plan.edited, base, scores=scores)
    patch.save(bench.out / "patch.safetensors")
    checkpoint = bench.out / "checkpoint"
    assert base.path is not None, "an organism lies in a folder"
    patch.plan(base.path).apply(checkpoint)
    with bench.step("verify"):
        agreement = verify(base.with_(steering), checkpoint)
    return bench.evaluate(load(checkpoint, dtype=base.dtype), "checkpoint"), agreement


def _twin(bench: Bench, plan: ExpertPlan, model: SteerableModel) -> Twin:
    """Score the twin's experts alike, and scale its own best."""
    baseline = bench.evaluate(model, f"twin-{PLAIN}")
    _, scores = _scored(bench, plan, model, "twin-")
    begun = Scaled("the twin's own experts", "twin", scores.top(plan.experts), plan.twin_betas, (baseline,))
    return Twin(model.name, scores, _scaled(bench, model, begun, "twin-own"))
