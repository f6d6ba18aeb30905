"""Figures of expert scores: the map layer × expert, and the volcano of score against p-value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from steer.figures import BLUE, GREY, ORANGE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = np.ndarray[Any, np.dtype[np.floating[Any]]]
Place = tuple[int, int]


def score_map(values: Numbers, layers: Sequence[int], ringed: Sequence[Place], title: str) -> Figure:
    """Draw scores of shape (layer, expert), layers upwards.

    Zero is white; the scale is symmetric, so that colours compare across signs. Missing scores are grey. Rings keep
    their size, so that they are seen among thousands of experts.

    Args:
        values: scores, NaN where there is none.
        layers: the number of each row.
        ringed: (row, expert) places to ring.
        title: above the map.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    rows, experts = values.shape
    size = (min(12.0, max(5.0, 2.2 + 0.3 * experts)), min(10.0, max(2.4, 1.4 + 0.3 * rows)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto", interpolation="none"
    )
    if ringed:
        marks = np.asarray(ringed)
        rings = axes.scatter(marks[:, 1], marks[:, 0], s=110, facecolors="none", edgecolors="black", linewidths=1.4)
        rings.set_path_effects([withStroke(linewidth=3.2, foreground="white")])  # Seen on dark colours, too.
    step = -(-rows // 16)
    axes.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="expert", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, label="score")
    return figure


def volcano(
    scores: Numbers, p_values: Numbers, q_values: Numbers, named: Mapping[Place, str], level: float, title: str
) -> Figure:
    """Draw score against -log10 p of every scored expert.

    Args:
        scores, p_values, q_values: of shape (layer, expert), NaN where there is no score.
        named: (row, expert) -> what is written beside its point.
        level: experts with q at most this are coloured, and a line is drawn at the largest p among them.
        title: above the picture.
    """
    from matplotlib.ticker import AutoLocator

    figure, (axes,) = canvas(1)
    figure.set_size_inches(7.0, 4.4)
    scored = np.isfinite(scores)
    heights = -np.log10(np.where(scored, np.maximum(p_values, np.finfo(np.float64).tiny), 1.0))
    found = scored & (q_values <= level)
    size = 18 if scored.sum() < 500 else 6
    for where, colour, told in ((scored & ~found, GREY, f"q > {level:g}"), (found, ORANGE, f"q ≤ {level:g}")):
        label = f"{told}: {int(where.sum())}"
        axes.scatter(scores[where], heights[where], s=size, color=colour, alpha=0.7, linewidths=0, label=label)
    if found.any():
        axes.axhline(float(heights[found].min()), color=BLUE, linewidth=0.8, linestyle="--")
    points: dict[tuple[float, float], list[str]] = {}
    for place, text in named.items():
        points.setdefault((float(scores[place]), float(heights[place])), []).append(text)
    levels = _levels(sorted(points), float(np.ptp(scores[scored])), float(np.ptp(heights[scored])))
    for point, level_of in levels.items():
        above = (0, 4 + 10 * level_of)
        axes.annotate(", ".join(points[point]), point, xytext=above, textcoords="offset points", fontsize=8, ha="center")  # fmt: skip
    axes.xaxis.set_major_locator(AutoLocator())
    axes.set(xlabel="score", ylabel="−log10 p", title=title)
    axes.margins(x=0.1, y=0.1 + 0.04 * max(levels.values(), default=0))
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _levels(points: Sequence[tuple[float, float]], width: float, height: float) -> dict[tuple[float, float], int]:
    """Return how many lines above its point each label stands, so that labels of neighbours are read."""
    found: dict[tuple[float, float], int] = {}
    for x, y in points:
        near = [level for (a, b), level in found.items() if abs(x - a) <= 0.15 * width and abs(y - b) <= 0.15 * height]
        found[x, y] = min(set(range(len(near) + 1)) - set(near))
    return found
