"""The map of heads: layers upwards, heads to the right, colour for the score, a frame around the chosen ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(values: np.ndarray[Any, np.dtype[np.float32]], chosen: Sequence[tuple[int, int]], title: str) -> Figure:
    """Draw scores of shape (layer, head).

    Zero is white; the scale is symmetric, so that colours compare across signs. Missing scores are grey.

    Args:
        values: scores, NaN where there is none.
        chosen: (layer, head) pairs to outline.
        title: above the map.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    layers, heads = values.shape
    figure = Figure(figsize=(min(12.0, 2.2 + 0.32 * heads), min(10.0, 1.6 + 0.26 * layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    for layer, head in chosen:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="head", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, label="score")
    return figure
