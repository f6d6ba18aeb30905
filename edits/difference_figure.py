"""The picture of a difference: which kind of tensor changed in which layer, and how much."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from steer.figures import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edits.difference import Difference

UNCHANGED = "#efefef"
LONGEST = 44


def difference_figure(difference: Difference) -> Figure:
    """Draw relative Frobenius norms: kind of tensor by layer, and bars for what lies outside the layers.

    A cell is the largest value among the tensors of its kind in its layer, such as experts; grey ones did not change.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inside, outside = _inside(difference), _outside(difference)
    heights = [0.32 * max(len(inside), 1) + 1.0, *([0.32 * len(outside) + 0.8] if outside else [])]
    layers = max(difference.layers, 1)
    width = min(16.0, 5.0 + 0.2 * layers)
    figure = Figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = f"{_short(difference.first)} → {_short(difference.second)}: "
    axes[0].set_title(f"{title}{difference.count} of {difference.tensors} tensors differ", fontsize=10)
    _heat_map(figure, axes[0], inside, layers)
    if outside:
        _bars(axes[1], outside)
    return figure


def _heat_map(figure: Figure, axes: Axes, inside: dict[str, dict[int, float]], layers: int) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(UNCHANGED)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not inside:
        axes.text(0.5, 0.5, "no tensor in a layer changed", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    cells: Float[np.ndarray, "kind layer"] = np.full((len(inside), layers), np.nan)
    for row, kind in enumerate(inside):
        for layer, value in inside[kind].items():
            cells[row, layer] = value or np.nan
    shown = cells[np.isfinite(cells) & (cells > 0)]
    lowest, highest = (float(shown.min()), float(shown.max())) if shown.size else (0.5, 1.0)
    if highest < 1.5 * lowest:  # One colour needs a scale too.
        lowest, highest = lowest / 1.5, highest * 1.5
    image = axes.imshow(
        np.clip(cells, lowest, highest),
        norm=LogNorm(lowest, highest),
        cmap="YlOrRd",
        aspect="auto",
        interpolation="none",
    )
    axes.set_yticks(range(len(inside)), [_short(kind) for kind in inside], fontsize=8)
    axes.set_xlim(-0.5, layers - 0.5)
    bar = figure.colorbar(image, ax=axes, label="‖a−b‖ / ‖a‖", pad=0.01)
    ticks = np.geomspace(lowest, highest, 5 if len(inside) > 3 else 3)[1:-1] if highest < 30 * lowest else None
    if ticks is not None:  # Too narrow for powers of ten.
        bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()


def _bars(axes: Axes, outside: dict[str, float]) -> None:
    names = list(outside)
    finite = [value for value in outside.values() if math.isfinite(value)]
    axes.barh(range(len(names)), [min(value, max(finite, default=1.0)) for value in outside.values()], color=BLUE)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axes.set(xlabel="outside the layers: ‖a−b‖ / ‖a‖", ylim=(len(names) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _inside(difference: Difference) -> dict[str, dict[int, float]]:
    """Largest relative change by kind and layer, kinds in order of name."""
    found: dict[str, dict[int, float]] = {}
    for tensor in sorted(difference.differing, key=lambda each: each.kind):
        if tensor.layer is not None:
            layers = found.setdefault(tensor.kind, {})
            layers[tensor.layer] = max(layers.get(tensor.layer, 0.0), tensor.change.relative)
    return found


def _outside(difference: Difference) -> dict[str, float]:
    return {each.kind: each.change.relative for each in difference.differing if each.layer is None}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]
