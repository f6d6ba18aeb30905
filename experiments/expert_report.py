"""The report of the demo on the mixture of experts: one HTML file that needs nothing else."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from experiments import expert_charts, expert_wording, wording
from experiments.page import Example, chosen_examples, filled
from steer.files import write_text

if TYPE_CHECKING:
    from experiments.demo_experts_result import ExpertDemoResult


def write_report(result: ExpertDemoResult, file: Path) -> None:
    """Write the report of a demo; the file must not exist."""
    write_text(file, render(result))


def render(result: ExpertDemoResult) -> str:
    """The HTML of the report."""
    own, scores, level = result.twin.own, result.scores, result.plan.level
    return filled(
        "experts.html.jinja",
        result=result,
        lead=wording.baseline(result.model, result.baseline),
        said={
            "finding": expert_wording.finding(result),
            "scaling": expert_wording.scaling(result),
            "controls": expert_wording.controls(result),
            "editing": expert_wording.editing(result),
            "verification": wording.verification(result.agreement),
            "twin": expert_wording.twin(result),
            "rice": expert_wording.RICE,
        },
        map=Markup(expert_charts.score_map(scores, result.found.experts)),
        volcano=Markup(expert_charts.volcano(scores, result.found.experts, level)),
        scaling=[Markup(chart) for chart in expert_charts.scaling_charts(result)],
        changes=[Markup(chart) for chart in expert_charts.change_charts(result)],
        twin_map=Markup(expert_charts.score_map(result.twin.scores, own.experts)),
        twin_volcano=Markup(expert_charts.volcano(result.twin.scores, own.experts, level)),
        score_table=expert_charts.score_rows(scores),
        change_table=expert_charts.change_rows(result),
        examples=examples(result),
        others=sorted(each.at(result.plan.edited).accuracy for each in result.controls),
        provenance=provenance(result),
    )


def examples(result: ExpertDemoResult) -> list[Example]:
    """Replies of three kinds, beside those without the experts and with a random pair."""
    strong = result.plan.edited

    first = result.found.betas[0]
    forms = (
        ("unchanged", result.baseline),
        (f"the experts found × {strong:g}", result.edited),
        (f"the experts found × {first:g}", result.found.at(first)),
        (f"{result.controls[0].name} × {strong:g}", result.controls[0].at(strong)),
    )
    return chosen_examples(
        "A short thought became a full one",
        "Nothing that matters changed",
        "The factor did harm, or chance did",
        result.baseline,
        result.edited,
        forms,
        result.card["marks"],
    )


def provenance(result: ExpertDemoResult) -> list[tuple[str, str]]:
    """What made the figures."""
    plan, meta, scores = result.plan, result.baseline.traces.meta, result.scores
    sampling = ", ".join(f"{name} {value}" for name, value in meta["sampling"].items())
    markers = ", ".join(f"{each.text} ({each.sign:+g}, {each.marked} tokens)" for each in scores.markers)
    return [
        ("model", f"{result.model}, weights {meta['model']['weights_id'][:12]}; the twin {result.twin.model}"),
        ("sampling", f"{sampling}, seed {result.seed}"),
        ("test questions", f"{plan.questions}, one reply each; intervals are 95 % over questions"),
        ("counts", f"{scores.tokens} tokens of {len(result.fit.traces)} replies to fit questions, prompts included; each marker where it is the input token"),
        ("scores", f"{scores.method} of {markers}; intervals over {plan.resamples} resamples of the questions; chances exact, markers permuted within each reply; false-discovery rates over all {len(scores.ranked)} experts"),
        ("scaling", "weights of the chosen experts multiplied after the choice, not normalised again, at every position"),
        ("other pairs", f"{plan.controls} random ones (seed {result.seed}), and for each expert that was found the one of its layer that is chosen most nearly as often"),
        ("versions", ", ".join(f"{name} {version(name)}" for name in ("reasoning-steer", "torch", "transformers"))),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}; {result.seconds:.0f} seconds in all"),
    ]  # fmt: skip
