"""Figures that results draw of themselves; each returns a matplotlib figure and shows or saves nothing.

The parts (`canvas`, `draw_cosines`, `draw_lengths`) are for other figures of the same kind, such as those of `probes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN = "#3b6fb6", "#d9822b", "#8a8a8a", "#5a9a68"
COLOURS = (BLUE, GREY, GREEN)
BINS = 40


class Halves(NamedTuple):
    """Cosine between directions from two halves of the questions: mean over splits, 5th and 95th percentile."""

    mean: float
    lower: float
    upper: float


def direction_figure(norms: Mapping[int, float], halves: Mapping[int, Halves], title: str) -> Figure:
    """Draw the norm per layer and, where it is known, the split-half cosine below.

    Args:
        norms: layer -> norm.
        halves: layer -> cosine; may be empty.
        title: above both.
    """
    figure, axes = canvas(2 if halves else 1)
    axes[0].bar(list(norms), list(norms.values()), color=BLUE)
    axes[0].set(ylabel="norm", title=title)
    if halves:
        draw_cosines(axes[1], halves)
    axes[-1].set_xlabel("layer")
    return figure


def lengths_figure(parts: Mapping[str, Sequence[int]], title: str, bins: int = BINS) -> Figure:
    """Draw how long thoughts are, as a histogram with one colour per part; arguments as `draw_lengths`."""
    figure, axes = canvas(1)
    draw_lengths(axes[0], parts, bins)
    axes[0].set_title(title)
    axes[0].legend(frameon=False)
    return figure


def draw_cosines(axes: Axes, halves: Mapping[int, Halves]) -> None:
    """Draw the split-half cosine per layer with its interval."""
    layers = list(halves)
    lower = [found.lower for found in halves.values()]
    axes.fill_between(layers, lower, [found.upper for found in halves.values()], color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(layers, [found.mean for found in halves.values()], color=BLUE, marker="o", markersize=3)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="cosine of two halves", ylim=(min(-0.1, *lower) - 0.02, 1.05))


def draw_lengths(axes: Axes, parts: Mapping[str, Sequence[int]], bins: int = BINS) -> None:
    """Draw a stacked histogram.

    Args:
        axes: to draw into.
        parts: label -> lengths in tokens, at most three; empty ones are left out.
        bins: how many.
    """
    coloured = [(label, lengths, COLOURS[index]) for index, (label, lengths) in enumerate(parts.items())]
    shown = [part for part in coloured if part[1]]
    axes.hist(
        [list(lengths) for _, lengths, _ in shown],
        bins=bins,
        stacked=True,
        color=[colour for _, _, colour in shown],
        label=[label for label, _, _ in shown],
    )
    axes.set(xlabel="length of thought, tokens", ylabel="traces")


def canvas(rows: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of `rows` panels on top of each other, whose horizontal axes count in whole numbers."""
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
