"""The picture of a sweep: what number of experts and beta do on the choosing questions, beside random experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steer.figures import BLUE, GREEN, GREY, ORANGE, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.expert_sweep_result import Answered, ExpertSweep

LINES = (BLUE, GREEN, "#8b5fb0", "#b05f5f", "#4f9aa8")
SHOWN = {"accuracy": "accuracy", "length": "tokens of thought", "repetition": "repeated n-grams"}


def figure_of(sweep: ExpertSweep) -> Figure:
    """Draw accuracy, length and repetition against beta: a line per number of experts, random ones as a band.

    Betas stand side by side in order, so that 0 has a place; 1 is the unsteered model. The ring is the chosen point.
    """
    plain, points = sweep.tried[0], sweep.tried[1:]
    betas = sorted({1.0, *(each.beta for each in points)})
    figure, axes = canvas(len(SHOWN))
    for panel, (name, label) in zip(axes, SHOWN.items(), strict=True):
        _band(panel, name, sweep.band, plain, betas)
        for place, number in enumerate(sorted({len(each.experts) for each in points})):
            line = {1.0: plain} | {each.beta: each for each in points if len(each.experts) == number}
            at = [(betas.index(beta), value) for beta in sorted(line) if (value := line[beta].means[name].value) is not None]  # fmt: skip
            panel.plot(*_split(at), color=LINES[place % len(LINES)], marker="o", markersize=3, label=_experts(number))
        value = sweep.best.means[name].value
        if sweep.chosen and value is not None:
            panel.plot([betas.index(sweep.best.beta)], [value], "o", color=ORANGE, markersize=9, fillstyle="none", label="chosen")  # fmt: skip
        panel.set_ylabel(label)
        panel.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes[0].set_title(f"{sweep.questions[1]} questions to choose on")
    axes[0].legend(frameon=False, fontsize=7)
    axes[-1].set_xlabel("beta")
    return figure


def _band(panel: Axes, name: str, band: Sequence[Answered], plain: Answered, betas: Sequence[float]) -> None:
    """Shade from the lowest to the highest random draw at every beta."""
    if not band:
        return
    found: dict[float, list[float]] = {}
    for each in (*band, plain):
        value = each.means[name].value
        if value is not None:
            found.setdefault(each.beta, []).append(value)
    at = [betas.index(beta) for beta in sorted(found)]
    low, high = ([end(found[beta]) for beta in sorted(found)] for end in (min, max))
    panel.fill_between(at, low, high, color=GREY, alpha=0.3, linewidth=1.5, label=f"random {_experts(len(band[0].experts))}")  # fmt: skip


def _split(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _experts(number: int) -> str:
    return f"{number} expert{'s' * (number != 1)}"
