"""Pictures of what probes found; each returns a matplotlib figure and shows or saves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.collect.summary import Summary
from probes.lengths import Choice
from steer.directions import Direction
from steer.errors import SteerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probes.directions import SplitHalf

BLUE, ORANGE, GREY = "#3b6fb6", "#d9822b", "#8a8a8a"


def direction_figure(direction: Direction, stability: SplitHalf | None = None, title: str = "Direction") -> Figure:
    """Draw the norm per layer and, below it, the split-half cosine per layer."""
    figure, axes = _canvas(2 if stability is not None else 1)
    norms = direction.norms
    axes[0].bar(list(norms), list(norms.values()), color=BLUE)
    axes[0].set(ylabel="norm", title=f"{title} at {direction.site}")
    if stability is not None:
        _split_half(axes[1], stability)
    axes[-1].set_xlabel("layer")
    return figure


def split_half_figure(stability: SplitHalf) -> Figure:
    """Draw the cosine between directions from two halves of the questions, with its 5th to 95th percentile."""
    figure, axes = _canvas(1)
    _split_half(axes[0], stability)
    axes[0].set(xlabel="layer", title=f"{stability.splits} splits")
    return figure


def length_histogram(summary: Summary, choice: Choice | None = None, bins: int = 40) -> Figure:
    """Draw how long the thoughts are, and where short ends and long begins.

    Args:
        summary: of traces.
        choice: its edges are drawn: one pair, or one pair per group.
        bins: of the histogram.

    Raises:
        SteerError: the summary keeps groups, which have no lengths.
    """
    lengths = [row.length for row in summary.rows if row.length is not None]
    if not lengths:
        raise SteerError(
            "the summary keeps groups, which have no lengths", "one row per trace", "Collect with --keep trace"
        )
    figure, axes = _canvas(1)
    counts = [
        [row.length for row in summary.rows if row.length is not None and (row.closed is not False) is closed]
        for closed in (True, False)
    ]
    axes[0].hist(
        [part for part in counts if part],
        bins=bins,
        stacked=True,
        color=[color for color, part in zip((BLUE, GREY), counts, strict=True) if part],
        label=[name for name, part in zip(("closed", "not closed"), counts, strict=True) if part],
    )
    for index, (below, above) in enumerate(choice.edges.values() if choice else ()):
        axes[0].axvline(below, color=ORANGE, linestyle="--", label="short ends" if index == 0 else None)
        axes[0].axvline(above, color=ORANGE, linestyle="-", label="long begins" if index == 0 else None)
    axes[0].set(
        xlabel="length of thought, tokens", ylabel="traces", title=f"{len(lengths)} traces of {summary.model.name}"
    )
    axes[0].legend(frameon=False)
    return figure


def _split_half(axes: Axes, stability: SplitHalf) -> None:
    axes.fill_between(stability.layers, stability.lower, stability.upper, color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(stability.layers, stability.mean, color=BLUE, marker="o", markersize=3)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="cosine of two halves", ylim=(min(-0.1, *stability.lower) - 0.02, 1.05))


def _canvas(rows: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 1.2 + 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for each in axes:
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
