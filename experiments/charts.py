"""Charts as inline SVG, styled by the page's classes, so that they follow its colours in light and dark.

Every chart is drawn 360 units wide, about the width of a phone, so that its letters stay readable when it fills one. Colour
never stands alone: series differ in line and marker too, and every mark has a title for pointers and screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from steer.intervals import Interval

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 42
Form = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line of intervals.

    Attributes:
        name: for the legend and the titles.
        kind: class of its marks: "main", "after" or "control".
        at: where on the horizontal axis.
        points: one interval each; those without a value leave a gap.
    """

    name: str
    kind: str
    at: tuple[float, ...]
    points: tuple[Interval, ...]


def share(value: float) -> str:
    """Per cent, without decimals, with a true minus."""
    return f"{round(100 * value)} %".replace("-", "−")


def fine_share(value: float) -> str:
    """Per cent, with a decimal where it is no whole number, with a true minus."""
    return f"{round(100 * value, 1) + 0.0:g} %".replace("-", "−")


def number(value: float) -> str:
    """As short as it can be, with a true minus."""
    return f"{value:g}".replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps."""
    if high - low < 1e-9:
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 10) for place in range(first, last + 1)]


def svg(body: Sequence[str], height: float, title: str) -> str:
    """Wrap marks into a picture that fills its column."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        + "".join(body)
        + "</svg>"
    )


def text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle", turned: bool = False) -> str:
    """A piece of text."""
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def mark(x: float, y: float, kind: str, words: str) -> str:
    """A point: a disc for the change, a square for what it is compared with, a ring for a control."""
    title = f"<title>{escape(words)}</title>"
    if kind == "before":
        return f'<rect class="mark {kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{title}</rect>'
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{3.2 if kind == "control" else 4.5}">{title}</circle>'


def said(name: str, point: Interval, form: Form) -> str:
    """What a mark's title says."""
    if point.value is None:
        return f"{name}: none"
    ends = "" if point.low is None or point.high is None else f" ({form(point.low)} to {form(point.high)})"
    return f"{name}: {form(point.value)}{ends}"


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    form: Form = number,
    y_range: tuple[float, float] | None = None,
    at_form: Form = number,
) -> str:
    """Lines with intervals; controls thin and dashed, the first series strong.

    Args:
        series: all on one horizontal axis.
        title: for screen readers.
        x_label: with unit.
        y_label: with unit.
        form: writes a value of the vertical axis.
        y_range: ends of the vertical axis; None fits the values.
        at_form: writes a place on the horizontal axis.
    """
    height = 236
    known = [point for each in series for point in each.points if point.value is not None]
    bounds = [bound for point in known for bound in (point.value, point.low, point.high) if bound is not None]
    marks = ticks(*(y_range or (min(bounds, default=0.0), max(bounds, default=1.0))))
    columns = sorted({at for each in series for at in each.at})
    pad = 0.06 * (columns[-1] - columns[0] or 1)

    def x(at: float) -> float:
        return LEFT + (at - columns[0] + pad) / (columns[-1] - columns[0] + 2 * pad) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - marks[0]) / (marks[-1] - marks[0]) * (height - BOTTOM - TOP)

    body = [
        line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") + text(LEFT - 6, y(tick) + 4, form(tick), anchor="end")
        for tick in marks
    ]
    body += [text(x(at), height - BOTTOM + 16, at_form(at)) for at in columns]
    body += [
        text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "label"),
        text(11, (TOP + height - BOTTOM) / 2, y_label, "label", turned=True),
    ]
    for each in reversed(series):
        body += _drawn(each, x, y, form, at_form)
    return svg(body, height, title)


def _drawn(
    series: Series, x: Callable[[float], float], y: Callable[[float], float], form: Form, at_form: Form
) -> list[str]:
    points = [(x(at), point, at) for at, point in zip(series.at, series.points, strict=True) if point.value is not None]
    path = " ".join(f"{place:.1f},{y(point.value or 0):.1f}" for place, point, _ in points)
    body = [f'<polyline class="line {series.kind}" points="{path}"/>']
    for place, point, at in points:
        if series.kind != "control" and point.low is not None and point.high is not None:
            body.append(line(float(place), y(point.low), float(place), y(point.high), f"whisker {series.kind}"))
        body.append(
            mark(float(place), y(point.value or 0), series.kind, said(f"{series.name} at {at_form(at)}", point, form))
        )
    return body


def category_chart(
    before: Sequence[Interval],
    after: Sequence[Interval],
    names: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    kinds: tuple[str, str],
) -> str:
    """Two intervals a category side by side, shares from 0 to 1; `kinds` names the two for the titles."""
    height = 236
    step = (WIDTH - LEFT - RIGHT) / len(names)

    def y(value: float) -> float:
        return height - BOTTOM - value * (height - BOTTOM - TOP)

    body = [
        line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") + text(LEFT - 6, y(tick) + 4, share(tick), anchor="end")
        for tick in (0, 0.25, 0.5, 0.75, 1)
    ]
    body += [
        text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "label"),
        text(11, (TOP + height - BOTTOM) / 2, y_label, "label", turned=True),
    ]
    for place, name in enumerate(names):
        centre = LEFT + (place + 0.5) * step
        body.append(text(centre, height - BOTTOM + 16, name))
        for shift, kind, word, point in ((-8, "before", kinds[0], before[place]), (8, "main", kinds[1], after[place])):
            if point.value is None:
                continue
            if point.low is not None and point.high is not None:
                body.append(line(centre + shift, y(point.low), centre + shift, y(point.high), f"whisker {kind}"))
            body.append(mark(centre + shift, y(point.value), kind, said(f"{word}, {name}", point, share)))
    return svg(body, height, title)


def row_chart(
    rows: Sequence[tuple[str, str, Interval]],
    title: str,
    x_label: str,
    reference: float | None = None,
    form: Form = share,
) -> str:
    """One interval a row with its label above it.

    Args:
        rows: label, class ("before", "main", "after", "control") and interval.
        title: for screen readers.
        x_label: with unit.
        reference: a vertical line, usually the unchanged model.
        form: writes a value.
    """
    height, step, left = 34 * len(rows) + 44, 34, 8
    bounds = [bound for _, _, point in rows for bound in (point.value, point.low, point.high) if bound is not None]
    bounds += [] if reference is None else [reference]
    marks = ticks(min(bounds, default=0.0), max(bounds, default=1.0))

    def x(value: float) -> float:
        return left + 10 + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - 2 * left - 24)

    bottom = step * len(rows) + 6
    body = [line(x(tick), 4, x(tick), bottom, "grid") + text(x(tick), bottom + 15, form(tick)) for tick in marks]
    body.append(text(WIDTH / 2, bottom + 33, x_label, "label"))
    if reference is not None:
        body.append(line(x(reference), 4, x(reference), bottom, "reference"))
    for place, (label, kind, point) in enumerate(rows):
        y = step * place + 25
        body.append(text(left, y - 10, label, "row", "start"))
        if point.value is None:
            continue
        if point.low is not None and point.high is not None:
            body.append(line(x(point.low), y, x(point.high), y, f"whisker {kind}"))
        body.append(mark(x(point.value), y, kind, said(label, point, form)))
    return svg(body, height, title)


def part_map(
    values: Sequence[Sequence[float]],
    chosen: Sequence[tuple[int, int]],
    title: str,
    part: str = "head",
    layers: Sequence[int] | None = None,
) -> str:
    """The map layer x part: filled by score, above or below zero, chosen parts outlined.

    Args:
        values: (layer, part); one that is not finite was not scored and stays empty.
        chosen: (layer, part) to outline, best first; their rank is written into them.
        title: for screen readers.
        part: what the columns are.
        layers: the number of each row; None counts from 0.
    """
    numbers, count = layers or range(len(values)), len(values[0])
    size = min(38.0, (WIDTH - LEFT - RIGHT) / count)
    known = [abs(value) for row in values for value in row if math.isfinite(value)]
    largest = max(known, default=0.0) or 1.0
    body = [
        text(LEFT + (column + 0.5) * size, TOP + len(values) * size + 16, str(column))
        for column in range(count)
        if count <= 16 or column % 4 == 0
    ]
    body += [
        text(LEFT - 8, TOP + (row + 0.5) * size + 4, str(layer), anchor="end") for row, layer in enumerate(numbers)
    ]
    height = TOP + len(values) * size + 40
    body += [
        text(LEFT + count * size / 2, height - 6, part, "label"),
        text(13, TOP + len(values) * size / 2, "layer", "label", turned=True),
    ]
    outlines = []
    for at, (layer, row) in enumerate(zip(numbers, values, strict=True)):
        for column, value in enumerate(row):
            x, y = LEFT + column * size, TOP + at * size
            told = f"{value:+.3f}" if math.isfinite(value) else "not scored"
            kind = "towards" if value > 0 else "away"
            depth = 0.06 + 0.94 * abs(value) / largest if math.isfinite(value) else 0.0
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" height="{size - 2:.1f}"'
            words = escape(f"layer {layer}, {part} {column}: {told}")
            body.append(f'<rect class="cell {kind}" {box} fill-opacity="{depth:.3f}"><title>{words}</title></rect>')
            if (layer, column) in chosen:
                rank = str(chosen.index((layer, column)) + 1)
                outlines.append(f'<rect class="chosen" {box}/>' + text(x + size / 2, y + size / 2 + 4, rank, "rank"))
    return svg([*body, *outlines], height, title)
