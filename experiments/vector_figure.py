"""The picture of a reasoning vector, from what `experiments.vectors` measured: accuracy, length, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figure import CONTROL, INK, MAIN
from steer.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF = "#d9822b"
Point = Mapping[str, float | None]


def draw(result: Mapping[str, Any], picture: Path) -> None:
    """Draw a result; a picture that exists is replaced."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    accuracy, length, layers = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1.1, 1, 1.2)})
    _curves(accuracy, result["curves"], "accuracy", 100.0)
    accuracy.set(ylabel="right answers, %", ylim=(0, 100), title="Accuracy")
    accuracy.legend(frameon=False, fontsize=8, loc="upper left")
    _curves(length, result["curves"], "thinking_tokens", 1.0)
    length.set(ylabel="tokens of thought", title="Length of thought")
    length.set_ylim(bottom=0)
    _layers(layers, result["layers"])
    for axes in (accuracy, length, layers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=10.5, fontweight="bold", color=INK)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(picture, overwrite=True) as partial:
        figure.savefig(partial, dpi=160, format=picture.suffix.lstrip(".") or "png")


def _curves(axes: Axes, curves: Sequence[Mapping[str, Any]], figure: str, factor: float) -> None:
    labelled = False
    for curve in reversed(curves):
        at = [point["alpha"] for point in curve["points"]]
        points = [point[figure] for point in curve["points"]]
        values = [factor * float(point["value"]) for point in points]
        if curve["name"].startswith("random"):
            label = None if labelled else "random vectors of equal norm per tensor"
            axes.plot(at, values, "--o", color=CONTROL, markersize=4, markerfacecolor="white", label=label)
            labelled = True
            continue
        whole = curve["name"] == "vector"
        label, colour, form = ("reasoning vector", MAIN, "-o") if whole else ("the same in bfloat16", HALF, ":s")
        spread = _spread(points, factor)
        axes.errorbar(at, values, yerr=spread, fmt=form, color=colour, markersize=4.5, linewidth=1.8, label=label)
    axes.set(xlabel="alpha", xticks=[point["alpha"] for point in curves[0]["points"]])


def _layers(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    """Change of accuracy by layer: only this layer, all but this layer, a random vector in this layer."""
    kinds = (
        ("alone", "only this layer, against the base", MAIN),
        ("without", "all but this layer, against all", HALF),
        ("random", "random, only this layer", CONTROL),
    )
    for shift, (kind, label, colour) in zip((-0.26, 0.0, 0.26), kinds, strict=True):
        points = [layer[kind] for layer in layers]
        at = [place + shift for place in range(len(layers))]
        axes.errorbar(
            at, [100 * float(point["value"]) for point in points], yerr=_spread(points, 100.0),
            fmt="o", color=colour, markersize=4, linewidth=1.4, label=label,
        )  # fmt: skip
    axes.axhline(0, color=CONTROL, linewidth=0.8)
    names = ["outside" if layer["layer"] < 0 else str(layer["layer"]) for layer in layers]
    axes.set(xticks=range(len(layers)), xticklabels=names, xlabel="layer", ylabel="change of right answers, points")
    axes.set_title("Which layers carry it (alpha = 1)")
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")


def _spread(points: Sequence[Point], factor: float) -> list[list[float]]:
    """Distances to the ends of the intervals, as matplotlib takes them."""
    values = [float(point["value"] or 0.0) for point in points]
    ends = [[float(point[end] or 0.0) for point in points] for end in ("low", "high")]
    return [[factor * abs(end - value) for end, value in zip(found, values, strict=True)] for found in ends]
