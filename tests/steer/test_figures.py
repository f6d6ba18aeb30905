"""Figures hold the numbers that they were given; what cannot be drawn fails when the pixels are asked for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from steer.figures import COLOURS, Halves, direction_figure, lengths_figure

NORMS = {2: 1.5, 3: 0.5, 7: 4.0}
HALVES = {2: Halves(0.9, 0.8, 0.95), 3: Halves(-0.2, -0.4, 0.1), 7: Halves(0.5, 0.3, 0.7)}


def drawn(figure: Figure) -> int:
    """How many different bytes the picture has; one where nothing was drawn."""
    figure.canvas.draw()
    return len(set(bytes(figure.canvas.buffer_rgba())))  # type: ignore[attr-defined]


def test_norms_stand_at_their_layers() -> None:
    figure = direction_figure(NORMS, {}, "Direction at z")
    (axes,) = figure.axes
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert bars == [pytest.approx(pair) for pair in NORMS.items()]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Direction at z", "layer", "norm")
    assert drawn(figure) > 10


def test_cosines_stand_below_with_their_interval() -> None:
    figure = direction_figure(NORMS, HALVES, "Direction at z")
    below = figure.axes[1]
    assert np.asarray(below.lines[0].get_xdata()).tolist() == [2, 3, 7]
    assert np.asarray(below.lines[0].get_ydata()).tolist() == [0.9, -0.2, 0.5]
    corners = np.array(below.collections[0].get_paths()[0].vertices)
    assert {tuple(corner) for corner in corners} >= {(2, 0.8), (2, 0.95), (3, -0.4), (3, 0.1), (7, 0.3), (7, 0.7)}
    assert below.get_ylim()[0] < -0.4, "the lowest end is inside the picture"
    assert drawn(figure) > 10


def test_lengths_are_counted_once_each_in_the_colour_of_their_part() -> None:
    figure = lengths_figure({"closed": [3, 4, 4, 9], "not closed": [], "without": [7]}, "five", bins=6)
    (axes,) = figure.axes
    heights = np.array([[bar.get_height() for bar in part] for part in axes.containers])
    assert heights.sum(1).tolist() == [4, 1]
    assert heights.shape[1] == 6
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["closed", "without"]
    faces = [part[0].get_facecolor() for part in axes.containers]
    assert faces == [pytest.approx(_rgba(COLOURS[0])), pytest.approx(_rgba(COLOURS[2]))]
    assert drawn(figure) > 10


def test_more_parts_than_colours_are_an_error_and_not_left_out() -> None:
    with pytest.raises(IndexError):
        lengths_figure({name: [1] for name in "abcd"}, "four")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = (
        "import sys, steer.directions, steer.traces; sys.exit('matplotlib' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _rgba(colour: str) -> tuple[float, ...]:
    return (*(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)), 1.0)
