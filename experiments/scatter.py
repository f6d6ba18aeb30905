"""A chart of points with labels, as inline SVG like those of `experiments.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, line, mark, number, svg, text, ticks

LETTER, LINE = 6.8, 13.0
"""About how wide a letter of a label is, and how far apart two labels stand."""


@dataclass(frozen=True)
class Spot:
    """A point of a scatter: where, its class, what its title says, and what is written beside it."""

    x: float
    y: float
    kind: str
    words: str
    label: str = ""


def scatter(spots: Sequence[Spot], title: str, x_label: str, y_label: str, level: float | None = None) -> str:
    """Points, some of them with a label above them.

    Args:
        spots: at least one; later ones are drawn over earlier ones.
        title: for screen readers.
        x_label, y_label: with unit.
        level: where a horizontal line is drawn.
    """
    height = 260
    across = ticks(min(spot.x for spot in spots), max(spot.x for spot in spots))
    upwards = ticks(0.0, 1.3 * max(*(spot.y for spot in spots), level or 0.0))

    def x(value: float) -> float:
        return LEFT + 10 + (value - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT - 20)

    def y(value: float) -> float:
        return height - BOTTOM - (value - upwards[0]) / (upwards[-1] - upwards[0]) * (height - BOTTOM - TOP)

    body = [
        line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") + text(LEFT - 6, y(tick) + 4, number(tick), anchor="end")
        for tick in upwards
    ]
    body += [text(x(tick), height - BOTTOM + 16, number(tick)) for tick in across]
    body += [
        text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "label"),
        text(11, (TOP + height - BOTTOM) / 2, y_label, "label", turned=True),
    ]
    if level is not None:
        body.append(line(LEFT, y(level), WIDTH - RIGHT, y(level), "reference"))
    body += [mark(x(spot.x), y(spot.y), spot.kind, spot.words) for spot in spots]
    body += _labels([(x(spot.x), y(spot.y), spot.label) for spot in spots if spot.label])
    return svg(body, height, title)


def _labels(wanted: Sequence[tuple[float, float, str]]) -> list[str]:
    """Texts above their points, inside the picture, each moved up until it covers no other."""
    placed: list[tuple[float, float, float]] = []
    body = []
    for left, top, words in sorted(wanted):
        half = LETTER * len(words) / 2
        centre, base = min(max(left, LEFT + half), WIDTH - half), top - 9
        while any(abs(base - y) < LINE and abs(centre - x) < half + wide for x, y, wide in placed):
            base -= LINE
        placed.append((centre, base, half))
        body.append(text(centre, base, words, "rank"))
    return body
