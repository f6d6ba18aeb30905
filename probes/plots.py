"""Pictures of what probes found; each returns a matplotlib figure and shows or saves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.collect.summary import Summary
from probes.lengths import Choice
from steer import figures
from steer.directions import Direction
from steer.errors import SteerError
from steer.figures import ORANGE, Halves, canvas, draw_cosines, draw_lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probes.directions import SplitHalf


def direction_figure(direction: Direction, stability: SplitHalf | None = None, title: str = "Direction") -> Figure:
    """Draw the norm per layer and, below it, the split-half cosine per layer."""
    halves = {} if stability is None else _halves(stability)
    return figures.direction_figure(direction.norms, halves, f"{title} at {direction.site}")


def split_half_figure(stability: SplitHalf) -> Figure:
    """Draw the cosine between directions from two halves of the questions, with its 5th to 95th percentile."""
    figure, axes = canvas(1)
    draw_cosines(axes[0], _halves(stability))
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
    parts = {
        name: [row.length for row in summary.rows if row.length is not None and (row.closed is not False) is closed]
        for name, closed in (("closed", True), ("not closed", False))
    }
    figure, axes = canvas(1)
    draw_lengths(axes[0], parts, bins)
    for index, (below, above) in enumerate(choice.edges.values() if choice else ()):
        axes[0].axvline(below, color=ORANGE, linestyle="--", label="short ends" if index == 0 else None)
        axes[0].axvline(above, color=ORANGE, linestyle="-", label="long begins" if index == 0 else None)
    axes[0].set_title(f"{len(lengths)} traces of {summary.model.name}")
    axes[0].legend(frameon=False)
    return figure


def _halves(stability: SplitHalf) -> dict[int, Halves]:
    rows = zip(stability.layers, stability.mean, stability.lower, stability.upper, strict=True)
    return {layer: Halves(*values) for layer, *values in rows}
