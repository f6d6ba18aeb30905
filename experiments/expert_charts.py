"""The report's pictures and tables of experts: scores, what scaling does, beside other pairs and the twin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from experiments import charts, expert_wording, wording
from experiments.changes import closed_share
from experiments.charts import Series
from experiments.page import interval
from experiments.scatter import Spot, scatter
from probes.experts.null import PRECISION
from steer.intervals import Interval

if TYPE_CHECKING:
    from experiments.demo_experts_result import ExpertDemoResult, Scaled
    from steer.expert_interventions import Expert
    from steer.expert_scores import ExpertScores

ZERO = -4.0
"""Where beta 0 stands on an axis of doublings."""
FRACTIONS = {0.25: "¼", 0.5: "½"}


def score_map(scores: ExpertScores, chosen: tuple[Expert, ...]) -> str:
    """The map of expert scores with the chosen ones outlined."""
    return charts.part_map(scores.values.tolist(), chosen, "Score of every expert", "expert", scores.layers)


def volcano(scores: ExpertScores, chosen: tuple[Expert, ...], level: float) -> str:
    """Score against -log10 of the chance, with the line above which the false-discovery rate is at most `level`."""
    assert scores.p_value is not None
    found = set(expert_wording.discovered(scores, level))
    spots = []
    for expert in reversed(scores.ranked):
        height = -math.log10(max(float(scores.p_value[scores.place(expert)]), PRECISION))
        kind = "main" if expert in chosen else "after" if expert in found else "control"
        label = "({}, {})".format(*expert) if expert in found else ""
        words = f"layer {expert[0]}, expert {expert[1]}: score {charts.number(round(scores[expert], 3))}, −log10 p {height:.3g}"
        spots.append(Spot(scores[expert], height, kind, words, label))
    line = min((spot.y for spot in spots if spot.label), default=None)
    return scatter(spots, "Score and chance of every expert", "score", "−log10 p", line)


def place(beta: float) -> float:
    """A factor on the axis of doublings."""
    return math.log2(beta) if beta else ZERO


def factor(at: float) -> str:
    """What is written at a place of that axis."""
    beta = 0.0 if at == ZERO else 2.0**at
    return FRACTIONS.get(beta, charts.number(beta))


def scaling_charts(result: ExpertDemoResult) -> tuple[str, str, str]:
    """Factor against length, accuracy and closed share."""
    x = "factor on the weights of the experts"

    def series(*path: str) -> list[Series]:
        return [
            Series(
                each.name,
                "main" if each.kind == "found" else "control",
                tuple(map(place, each.betas)),
                tuple(interval(run, *path) for run in each.runs),
            )
            for each in (result.found, *result.controls)
        ]

    whole = (0.0, 1.0)
    return (
        charts.line_chart(
            series("thinking_tokens", "mean"), "Length of thought by factor", x, "tokens of thought", at_form=factor
        ),
        charts.line_chart(series("accuracy"), "Accuracy by factor", x, "right answers", charts.share, whole, factor),
        charts.line_chart(
            series("thoughts", "closed"), "Closed thoughts by factor", x, "closed thoughts", charts.share, whole, factor
        ),
    )


def change_charts(result: ExpertDemoResult) -> tuple[str, str]:
    """The change of accuracy at the mild factor and at the one that was written, by pair."""
    kinds = {"found": "main", "twin": "after"}

    def chart(beta: float) -> str:
        rows: list[tuple[str, str, Interval]] = [
            (f"{each.name}: {_experts(each)}", kinds.get(each.kind, "control"), result.change(each, beta).accuracy)
            for each in everything(result)
            if beta in each.betas
        ]
        title = f"Change of accuracy at factor {beta:g}"
        return charts.row_chart(rows, title, f"change of right answers at factor {beta:g}, points", 0.0, points)

    return chart(result.plan.mild), chart(result.plan.edited)


def points(value: float) -> str:
    """A change of a share in points, with a true minus."""
    return f"{round(100 * value)}".replace("-", "−")


def everything(result: ExpertDemoResult) -> tuple[Scaled, ...]:
    """All experts that were scaled: those found, the other pairs, the twin's."""
    return (result.found, *result.controls, result.twin.own)


def change_rows(result: ExpertDemoResult) -> list[tuple[str, str, list[dict[str, str]]]]:
    """The table: name, experts, and per factor what changed against the unchanged model."""
    return [
        (each.name, _experts(each), [_row(result, each, beta) for beta in each.betas]) for each in everything(result)
    ]


def _row(result: ExpertDemoResult, scaled: Scaled, beta: float) -> dict[str, str]:
    run, change = scaled.at(beta), result.change(scaled, beta)
    return {
        "beta": FRACTIONS.get(beta, charts.number(beta)),
        "accuracy": wording.percent(run.accuracy),
        "accuracy_change": "" if beta == 1 else wording.brief(change.accuracy),
        "short_change": "" if beta == 1 else wording.brief(change.short_share),
        "length": wording.tokens(run.mean_thinking_tokens),
        "closed": wording.percent(closed_share(run)),
    }


def score_rows(scores: ExpertScores, shown: int = 8) -> list[dict[str, str]]:
    """The table of the first experts: score, chances, and how often each is chosen, at the marks and anywhere."""
    rows = []
    for told in scores.rows()[:shown]:
        expert = (told["layer"], told["expert"])
        rows.append(
            {
                "expert": f"{expert[0]}.{expert[1]}",
                "score": expert_wording.score(scores, expert)
                .replace(f"95{wording.SPACE}% interval ", "")
                .replace(" ", wording.SPACE),
                "q": chance(told.get("q_value")),
                "share": wording.percent(told["share"]),
                **{f"at {each.text}": wording.percent(told[f"share of {each.text}"]) for each in scores.markers},
            }
        )
    return rows


def chance(value: float | None) -> str:
    """A chance or a false-discovery rate, with three decimals or as what it lies below."""
    if value is None or np.isnan(value):
        return wording.UNKNOWN
    return f"{value:.3f}" if value >= 0.001 else "below 0.001"


def _experts(scaled: Scaled) -> str:
    return ", ".join(f"{layer}.{expert}" for layer, expert in scaled.experts)
