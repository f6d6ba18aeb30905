"""Pictures show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import probes
from probes.collect.run import collect
from probes.lengths import LengthRule, choose
from probes.plots import direction_figure, length_histogram
from steer.errors import SteerError
from tests.probes import made
from tests.probes.test_directions import direction, planted


def drawn(figure: Figure) -> bytes:
    """Return the picture's pixels, which fails where something cannot be drawn."""
    figure.canvas.draw()
    return bytes(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


def test_a_direction_shows_its_norms_and_its_stability() -> None:
    summary = planted()
    found = direction(summary)
    halves = probes.split_half(summary, found)
    figure = direction_figure(found, halves)
    norms, cosines = figure.axes
    assert [bar.get_height() for bar in norms.patches] == pytest.approx(list(found.norms.values()))
    assert list(cosines.lines[0].get_ydata()) == pytest.approx(list(halves.mean))
    assert len(set(drawn(figure))) > 10
    assert drawn(halves.plot())
    assert len(direction_figure(found).axes) == 1


def test_the_histogram_counts_every_trace_and_shows_the_edges() -> None:
    summary = collect(made.model(), made.traces(12))
    choice = choose(summary.rows, [True] * len(summary), LengthRule(below=12, above=18))
    figure = length_histogram(summary, choice)
    axes = figure.axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights) == len(summary)
    assert {float(np.asarray(line.get_xdata())[0]) for line in axes.lines} == {12.0, 18.0}
    assert len(summary.plot().axes[0].lines) == 0
    assert drawn(figure)


def test_groups_have_no_histogram() -> None:
    summary = collect(made.model(), made.traces(4), keep="group")
    with pytest.raises(SteerError, match="one row per trace"):
        length_histogram(summary)


def test_one_layer_is_enough() -> None:
    values = torch.zeros(4, 1, 3)
    values[2:, 0, 0] = 1
    summary = made.summary([made.row(n, 5 if n < 2 else 50) for n in range(4)], {"resid_mid/thinking": values})
    found = probes.length_direction(summary, span="thinking", below=10, above=40)
    assert drawn(direction_figure(found))
