"""The demo's report: one HTML file that needs nothing else, to be read without the code.

`python -m experiments.report DEMO.json --figure FILE.png` draws the README's picture from a demo's `result.json`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from experiments import charts, probe_charts, probe_wording, wording
from experiments.charts import Series
from experiments.page import Example, chosen_examples, filled, interval
from steer.files import write_text
from steer.intervals import Interval

if TYPE_CHECKING:
    from experiments.curve import Curve
    from experiments.demo_result import DemoResult, Edit

FIFTHS = ("shortest", "2nd", "3rd", "4th", "longest")


def write_report(result: DemoResult, file: Path) -> None:
    """Write the report of a demo; the file must not exist."""
    write_text(file, render(result))


def render(result: DemoResult) -> str:
    """The HTML of the report."""
    return filled(
        "demo.html.jinja",
        result=result,
        sentences=wording.headline(result),
        said={name: getattr(probe_wording, name)(result) for name in ("direction", "side_effects", "heads")},
        direction=[Markup(chart) for chart in probe_charts.direction_charts(result)],
        share=Markup(probe_charts.share_chart(result)),
        effects=[Markup(chart) for chart in probe_charts.effect_charts(result)],
        effect_table=probe_charts.effect_rows(result),
        steering=[Markup(chart) for chart in steering_charts(result)],
        heads=Markup(head_chart(result)),
        fifths=Markup(fifths_chart(result)),
        edits=[Markup(chart) for chart in edit_charts(result)],
        table=[_row(result, edit) for edit in result.edits],
        slopes=_slopes(result),
        examples=examples(result),
        provenance=provenance(result),
    )


def steering_charts(result: DemoResult) -> tuple[str, str, str]:
    """Coefficient against length, accuracy and closed share."""
    x = "coefficient of the length direction"

    def series(*path: str) -> list[Series]:
        def points(curve: Curve) -> tuple[Interval, ...]:
            return tuple(interval(run, *path) for run in curve.runs)

        controls = [
            Series(f"random direction {number}", "control", curve.coefficients, points(curve))
            for number, curve in enumerate(result.controls, 1)
        ]
        return [Series("length direction", "main", result.curve.coefficients, points(result.curve)), *controls]

    whole = (0.0, 1.0)
    return (
        charts.line_chart(
            series("thinking_tokens", "mean"), "Length of thought by coefficient", x, "tokens of thought"
        ),
        charts.line_chart(series("accuracy"), "Accuracy by coefficient", x, "right answers", charts.share, whole),
        charts.line_chart(
            series("thoughts", "closed"), "Closed thoughts by coefficient", x, "closed thoughts", charts.share, whole
        ),
    )


def head_chart(result: DemoResult) -> str:
    """The map of head scores with the edited heads outlined."""
    return charts.part_map(result.scores.values.tolist(), result.edit.heads, "Score of every attention head")


def fifths_chart(result: DemoResult) -> str:
    """Accuracy by length of thought, before and after the edit."""
    before, after = (
        [Interval(each["value"], each["low"], each["high"]) for each in run.summary["accuracy_by_fifth_of_length"]]
        for run in (result.baseline, result.edit.run)
    )
    return charts.category_chart(
        before,
        after,
        FIFTHS,
        "Accuracy by length of thought",
        "fifths of the replies, by length of thought",
        "right answers",
        ("unchanged", "ThinkEdit"),
    )


def edit_charts(result: DemoResult) -> tuple[str, str]:
    """Accuracy and share of short thoughts: unchanged, edited, and the controls."""
    kinds = {"thinkedit": "main", "other span": "after"}

    def rows(*path: str) -> list[tuple[str, str, Interval]]:
        unchanged = ("unchanged", "before", interval(result.baseline, *path))
        return [
            unchanged,
            *((edit.name, kinds.get(edit.kind, "control"), interval(edit.run, *path)) for edit in result.edits),
        ]

    def chart(title: str, x: str, *path: str) -> str:
        return charts.row_chart(rows(*path), title, x, interval(result.baseline, *path).value)

    return (
        chart("Accuracy by edit", "right answers", "accuracy"),
        chart("Share of short thoughts by edit", "short thoughts", "thoughts", "short"),
    )


def _row(result: DemoResult, edit: Edit) -> dict[str, str]:
    change = result.change(edit)
    return {
        "name": edit.name,
        "heads": ", ".join(f"{layer}.{head}" for layer, head in edit.heads),
        "accuracy": wording.percent(edit.run.accuracy),
        "accuracy_change": wording.brief(change.accuracy),
        "short": wording.percent(edit.run.summary["thoughts"]["short"]["value"]),
        "short_change": wording.brief(change.short_share),
        "length": wording.tokens(edit.run.mean_thinking_tokens),
        "shortest": wording.brief(change.accuracy_of_shortest_fifth),
    }


def _slopes(result: DemoResult) -> list[tuple[str, str]]:
    curves = [("length direction", result.curve)]
    curves += [(f"random direction {number}", curve) for number, curve in enumerate(result.controls, 1)]
    found = [(name, curve.slope(result.seed)) for name, curve in curves]
    return [
        (name, f"{slope.value:+.1f} ({slope.low:+.1f} to {slope.high:+.1f})".replace("-", "−"))
        for name, slope in found
        if slope.value is not None and slope.low is not None and slope.high is not None
    ]


def examples(result: DemoResult) -> list[Example]:
    """Replies of three kinds, beside those of both ends of the steering."""
    forms = (
        ("unchanged", result.baseline),
        ("ThinkEdit", result.edit.run),
        (f"steered by {charts.number(result.curve.coefficients[0])}", result.curve.runs[0]),
        (f"steered by {charts.number(result.curve.coefficients[-1])}", result.curve.runs[-1]),
    )
    return chosen_examples(
        "The edit turned a short thought into a full one",
        "The edit changed nothing that matters",
        "The edit did harm, or chance did",
        result.baseline,
        result.edit.run,
        forms,
        result.card["marks"],
    )


def provenance(result: DemoResult) -> list[tuple[str, str]]:
    """What made the figures."""
    plan, sampling = result.plan, result.baseline.traces.meta["sampling"]
    return [
        ("model", f"{result.model}, weights {result.baseline.traces.meta['model']['weights_id'][:12]}"),
        ("sampling", ", ".join(f"{name} {value}" for name, value in sampling.items()) + f", seed {result.seed}"),
        ("test questions", f"{plan.questions}, one reply each; intervals are 95 % over questions"),
        ("direction", f"span {plan.span} at {result.direction.site}, {len(result.fit.traces)} replies to fit questions; shortest and longest fifth within questions of one size"),
        ("probes", f"held-out areas over questions, first {plan.prefix} positions; {result.probed.share.traces} short thoughts patched; side effects on the first {plan.effect_questions} test questions, with the first of the random directions"),
        ("steering", f"added at {plan.site} of layers {', '.join(map(str, plan.layers))}, at every position"),
        ("versions", ", ".join(f"{name} {version(name)}" for name in ("reasoning-steer", "torch", "transformers"))),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}; {result.seconds:.0f} seconds in all"),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the README's picture."""
    from experiments.figure import draw

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="result.json of a demo")
    parser.add_argument("--figure", type=Path, required=True, help="the picture: .png or .svg")
    options = parser.parse_args(arguments)
    draw(options.result, options.figure)


if __name__ == "__main__":
    main()
