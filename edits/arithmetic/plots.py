"""Pictures of a reasoning vector; each returns a matplotlib figure and shows or saves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edits.arithmetic.selection import OUTSIDE, layer_of
from steer.figures import BLUE, GREY, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from edits.arithmetic.spectrum import Spectrum
    from edits.arithmetic.tables import LayerTable

MOST = 24  # Kinds of module in a picture.


def layers_figure(table: LayerTable) -> Figure:
    """Draw the norm of each layer, and below it the relative norm of each module in each layer, dark for large.

    What is outside of the layers is drawn in grey, left of layer 0. Where nothing was subtracted, the second panel
    shows norms.
    """
    figure, axes = canvas(2)
    norms = table.layers()
    axes[0].bar(list(norms), list(norms.values()), color=[GREY if layer == OUTSIDE else BLUE for layer in norms])
    axes[0].set(ylabel="norm", title=table.label)
    axes[0].xaxis.set_major_formatter(lambda place, _: "outside" if place == OUTSIDE else f"{place:.0f}")
    inside = [row for row in table.rows if row.layer != OUTSIDE]
    kinds = list(dict.fromkeys(row.module for row in inside))[:MOST]
    layers = sorted({row.layer for row in inside})
    relative = any(row.relative is not None for row in inside)
    grid = [[float("nan")] * len(layers) for _ in kinds]
    for row in inside:
        if row.module in kinds:
            value = row.relative if relative else row.norm
            grid[kinds.index(row.module)][layers.index(row.layer)] = float("nan") if value is None else value
    if kinds:
        first, last = layers[0] - 0.5, layers[-1] + 0.5
        extent = (first, last, len(kinds) - 0.5, -0.5)
        shown = axes[1].imshow(grid, aspect="auto", cmap="Blues", vmin=0, extent=extent, interpolation="nearest")
        axes[1].set_yticks(range(len(kinds)), kinds, fontsize=7)
        figure.colorbar(shown, ax=axes[1], label="norm / norm of the weights" if relative else "norm")
        figure.set_figheight(3.6 + 0.22 * len(kinds))
    axes[1].set_xlabel("layer")
    return figure


def spectrum_figure(spectrum: Spectrum) -> Figure:
    """Draw the share of the squared norm by rank: a line per matrix, from light (first layer) to dark (last)."""
    from matplotlib import colormaps

    figure, axes = canvas(1)
    layers = sorted({layer_of(row.matrix) for row in spectrum.rows})
    for row in spectrum.rows:
        place = layers.index(layer_of(row.matrix)) / max(1, len(layers) - 1)
        ranks = range(1, len(row.values) + 1)
        axes[0].plot(ranks, row.energy, color=colormaps["Blues"](0.3 + 0.7 * place), linewidth=0.9)
    if spectrum.rows:
        ranks = range(1, spectrum.k + 1)
        axes[0].plot(ranks, [spectrum.energy(rank) for rank in ranks], color="black", linewidth=2, label="all matrices")
        axes[0].legend(frameon=False)
    axes[0].set(xlabel="rank", ylabel="share of the squared norm", ylim=(0, 1.02), title=spectrum.label)
    return figure
