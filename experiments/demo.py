"""The whole loop on a bundled organism: evaluate, find the length direction, steer, edit heads, verify, report.

One span is used throughout, the one that the organism's card names first; the edit with the other span is one row of the
report. Directions and head scores come from fit questions, every figure from test questions; how far the direction and the heads
can be trusted is judged on the fit questions, held out in turn. Nothing is chosen here: layers, coefficients and the number
of heads stand in the card.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edits.agreement import Agreement
from edits.thinkedit import thinkedit
from edits.verify import verify
from experiments.bench import PLAIN, RESULT, Bench, Tell, own_folder, refuse_existing
from experiments.curve import Curve, steering_curve, steering_for
from experiments.demo_probes import Probed, carried, control_seed, judged, recorders, side_effects
from experiments.demo_result import DemoResult, Edit
from experiments.run import Run
from probes.collect.run import collect
from probes.directions import length_direction
from probes.heads import head_scores
from steer.errors import SteerError
from steer.files import write_text
from steer.generation import Sampling
from steer.model import load
from steer.threads import one_thread

if TYPE_CHECKING:
    from probes.collect.summary import Summary
    from steer.directions import Direction
    from steer.model import SteerableModel
    from steer.scores import HeadScores
    from steer.steering import Steering


@dataclass(frozen=True)
class Plan:
    """What the demo does; the organism's card fills it.

    Attributes:
        span: over which activations are averaged.
        other_span: of the one extra edit.
        site, layers, coefficients: where and how strongly the direction is added.
        heads: how many are edited.
        percentiles: which thoughts are short and long, within questions of one size.
        questions: test questions per point, one reply each; whole shards of 64, since a step costs the same for few rows.
        fit_questions, fit_samples: what the direction is made from.
        controls: random directions, and random choices of heads.
        prefix: positions at the beginning of a thought over which the direction is judged as well; few enough that every
            thought of the organism has them.
        patched: short thoughts in which heads are patched.
        head_draws: random choices of heads that are patched beside them.
        effect_questions: test questions whose thoughts are read with and without the steering.
    """

    span: str
    other_span: str
    site: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    heads: int
    percentiles: tuple[float, float] = (20.0, 80.0)
    questions: int = 192
    fit_questions: int = 384
    fit_samples: int = 1
    controls: int = 2
    prefix: int = 8
    patched: int = 32
    head_draws: int = 5
    effect_questions: int = 64

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Plan:
        """Read a card."""
        steering, edit = card["steering"], card["thinkedit"]
        spans = ("predicts_thinking", "marker:;")
        other = card.get("thinkedit_matched", {}).get("span") or next(span for span in spans if span != edit["span"])
        low, high = card.get("percentiles", (20.0, 80.0))
        return cls(
            span=str(steering["span"]),
            other_span=str(other),
            site=str(steering["site"]),
            layers=tuple(steering["layers"]),
            coefficients=tuple(float(c) for c in steering["coefficients"]),
            heads=int(edit["heads"]),
            percentiles=(float(low), float(high)),
        )

    @property
    def steps(self) -> int:
        """How many evaluations and passes there are, for the progress."""
        points = sum(c != 0 for c in self.coefficients)
        return 10 + points * (1 + self.controls) + self.controls


def demo(
    out: str | Path,
    seed: int = 0,
    *,
    model: str = "organism:chain",
    plan: Plan | None = None,
    tell: Tell | None = None,
) -> DemoResult:
    """Run the whole loop and write everything into a new folder.

    Args:
        out: gets `report.html`, `result.json`, `checkpoint/`, `runs/`, and the direction, scores, steering and patch.
        seed: of the sampling and of the controls.
        model: an organism.
        plan: None takes the one of the organism's card.
        tell: called as the work goes on.

    Raises:
        SteerError: `out` exists, or the model is no organism.
    """
    out = Path(out)
    refuse_existing(out)
    began = time.monotonic()
    with one_thread():  # So tiny a model is slower on several.
        return _demo(load(model), out, seed, plan, tell or (lambda *_: None), began)


def _demo(base: SteerableModel, out: Path, seed: int, plan: Plan | None, tell: Tell, began: float) -> DemoResult:
    if base.card is None:
        raise SteerError(f"{base.name} is no organism with a card", "organism:chain")
    from experiments.report import write_report

    plan = Plan.of(base.card) if plan is None else plan
    own_folder(out, base.name, seed)
    bench = Bench(out, Sampling.of(base), seed, plan.questions, plan.steps, tell)
    baseline = bench.evaluate(base, PLAIN)
    fit = bench.evaluate(base, "fit", "chain:fit", plan.fit_questions, plan.fit_samples)
    with bench.step("read activations"):
        summary = collect(base, fit.traces, out / "summary", recorders=recorders(plan))
    direction = _direction(summary, plan, plan.span, out / "direction.safetensors")
    with bench.step("judge the direction"):
        quality = judged(direction, summary, plan, seed)
    steering = steering_for(direction, plan.site, plan.layers, "steered")
    steering.save(out / "steering.yaml")
    curve, controls = _curves(bench, plan, base, direction, steering, baseline)
    with bench.step("side effects"):
        effects = side_effects(base, curve, steering, baseline, plan, seed)
    with bench.step("score heads"):
        scores = head_scores(summary, direction, base, seed=seed)
        scores.save(out / "scores.safetensors")
    with bench.step("patch heads"):
        share = carried(base, fit, summary, direction, scores, plan, seed)
    edit, agreement = _edited(bench, plan, base, direction, scores)
    edits = (
        edit,
        _other_edit(bench, plan, base, summary, scores),
        *_control_edits(bench, plan, base, direction, scores),
    )
    result = DemoResult(
        out=out,
        model=base.name,
        base_checkpoint=Path(base.path or "."),
        card=base.card,
        plan=plan,
        seed=seed,
        baseline=baseline,
        fit=fit,
        curve=curve,
        controls=controls,
        direction=direction,
        scores=scores,
        probed=Probed(quality, share, effects),
        edits=edits,
        agreement=agreement,
        seconds=time.monotonic() - began,
    )
    bench.report()
    write_report(result, out / "report.html")
    write_text(out / RESULT, json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def _direction(summary: Summary, plan: Plan, span: str, file: Path) -> Direction:
    """The longest fifth of the fit thoughts minus the shortest, within questions of one size."""
    direction = length_direction(summary, span=span, percentiles=plan.percentiles, by_group=True)
    direction.save(file)
    return direction


def _curves(
    bench: Bench, plan: Plan, base: SteerableModel, direction: Direction, steering: Steering, baseline: Run
) -> tuple[Curve, tuple[Curve, ...]]:
    curve = steering_curve(base, steering, plan.coefficients, baseline, bench.evaluate)
    controls = []
    for draw in range(plan.controls):
        random = direction.random_like(control_seed(bench.seed, draw))
        other = steering_for(random, plan.site, plan.layers, f"random-direction-{draw + 1}")
        controls.append(steering_curve(base, other, plan.coefficients, baseline, bench.evaluate))
    return curve, tuple(controls)


def _edited(
    bench: Bench, plan: Plan, base: SteerableModel, direction: Direction, scores: HeadScores
) -> tuple[Edit, Agreement]:
    """Patch the best heads into a checkpoint, verify it against the hook form, and evaluate what was written."""
    heads = scores.top(plan.heads)
    patch = thinkedit(direction, heads, model=base)
    patch.save(bench.out / "patch.safetensors")
    checkpoint = bench.out / "checkpoint"
    assert base.path is not None, "an organism lies in a folder"
    patch.plan(base.path).apply(checkpoint)
    with bench.step("verify"):
        agreement = verify(base.with_(patch.steering()), checkpoint)
    run = bench.evaluate(load(checkpoint, dtype=base.dtype), "thinkedit")
    return Edit("ThinkEdit", heads, run), agreement


def _other_edit(bench: Bench, plan: Plan, base: SteerableModel, summary: Summary, scores: HeadScores) -> Edit:
    """The edit whose direction and scores come from the other span."""
    direction = _direction(summary, plan, plan.other_span, bench.out / "direction-other-span.safetensors")
    heads = head_scores(summary, direction, base, permutations=0, splits=0).top(plan.heads)
    patch = thinkedit(direction, heads, model=base)
    run = bench.evaluate(base.with_(patch), "thinkedit-other-span")
    return Edit(f"ThinkEdit, span {plan.other_span}", heads, run, kind="other span")


def _control_edits(
    bench: Bench, plan: Plan, base: SteerableModel, direction: Direction, scores: HeadScores
) -> Iterator[Edit]:
    """The same edit on random other heads, and of the same heads along a random direction."""
    best = scores.top(plan.heads)
    for draw in range(plan.controls):
        heads = scores.random(len(best), seed=1000 * bench.seed + draw, exclude=best)
        run = bench.evaluate(base.with_(thinkedit(direction, heads)), f"random-heads-{draw + 1}")
        yield Edit(f"{len(best)} random other heads, draw {draw + 1}", heads, run, kind="random heads")
    random = direction.random_like(control_seed(bench.seed))
    run = bench.evaluate(base.with_(thinkedit(random, best)), "random-direction")
    yield Edit("the same heads, a random direction", best, run, kind="random direction")
