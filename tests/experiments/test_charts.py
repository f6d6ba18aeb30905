from itertools import pairwise
from xml.etree import ElementTree

import pytest

from experiments.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    category_chart,
    line_chart,
    number,
    part_map,
    row_chart,
    share,
    ticks,
)
from steer.intervals import Interval


def parsed(picture):
    return ElementTree.fromstring(picture)


def of_class(picture, kind):
    return [element for element in parsed(picture).iter() if kind in element.get("class", "").split()]


def inside(picture):
    """Whether every mark and letter starts within the picture."""
    root = parsed(picture)
    _, _, width, height = map(float, root.get("viewBox").split())
    for element in root.iter():
        for name, limit in (("x", width), ("cx", width), ("x1", width), ("y", height), ("cy", height), ("y1", height)):
            if element.get(name) is not None:
                assert -0.1 <= float(element.get(name)) <= limit + 0.1, ElementTree.tostring(element)
    return True


@pytest.mark.parametrize(("low", "high"), [(0, 1), (12.3, 87.2), (-0.5, 0.5), (0.701, 0.709), (3, 3), (-40, -2)])
def test_ticks_are_round_and_hold_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) <= 1 and len(found) <= 8
    for step in steps:
        assert float(f"{step:.0e}") == pytest.approx(step) or f"{step:.1e}".startswith("2.5")


def made_lines():
    at = (-1.0, 0.0, 1.0)
    main = Series("length <direction>", "main", at, (Interval(10, 8, 12), Interval(20, 18, 22), Interval(40, 36, 44)))
    control = Series("random", "control", at, (Interval(21, 19, 23), Interval(20, 18, 22), Interval(None)))
    return line_chart([main, control], "Length", "coefficient", "tokens")


def test_points_lie_where_their_values_are():
    picture = made_lines()
    discs = [e for e in of_class(picture, "main") if e.tag.endswith("circle")]
    x, y = ([float(disc.get(name)) for disc in discs] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert (y[0] - y[1]) * 2 == pytest.approx(y[1] - y[2], abs=0.3), "20 to 40 is twice 10 to 20"
    assert min(x) >= LEFT and max(x) <= WIDTH - RIGHT and min(y) >= TOP and max(y) <= 236 - BOTTOM
    whiskers = of_class(picture, "whisker")
    assert len(whiskers) == 3, "controls have none"
    heights = [float(w.get("y1")) - float(w.get("y2")) for w in whiskers]
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.3)


def test_what_is_missing_is_not_drawn_and_what_is_said_is_escaped():
    picture = made_lines()
    assert len([e for e in of_class(picture, "control") if e.tag.endswith("circle")]) == 2
    titles = [e.text for e in parsed(picture).iter() if e.tag.endswith("title")]
    assert "length <direction> at −1: 10 (8 to 12)" in titles
    assert "length &lt;direction&gt;" in picture and inside(picture)


def test_the_map_of_heads():
    picture = part_map([[0.5, -1.0, 0.0], [2.0, 0.25, -0.5]], ((1, 0), (0, 0)), "scores")
    cells = of_class(picture, "cell")
    assert len(cells) == 6 and len(of_class(picture, "chosen")) == 2
    assert [e.text for e in of_class(picture, "rank")] == ["2", "1"], "ranks, in the order of the map"
    strength = {e[0].text: float(e.get("fill-opacity")) for e in cells}
    assert max(strength, key=strength.get) == "layer 1, head 0: +2.000" and strength["layer 1, head 0: +2.000"] == 1.0
    assert strength["layer 0, head 1: -1.000"] == pytest.approx(0.53)
    assert {e.get("class").split()[1] for e in cells if "-1.0" in e[0].text} == {"away"}
    outlined = [(e.get("x"), e.get("y")) for e in of_class(picture, "chosen")]
    assert outlined == [(cells[place].get("x"), cells[place].get("y")) for place in (0, 3)]
    assert inside(picture)


def test_many_heads_still_fit():
    assert inside(part_map([[0.1 * h for h in range(32)] for _ in range(28)], (), "large"))


def test_categories_and_rows():
    before = [Interval(0.1, 0.0, 0.3), Interval(None)]
    after = [Interval(0.5, 0.4, 0.7), Interval(1.0, 1.0, 1.0)]
    picture = category_chart(before, after, ("short", "long"), "t", "x", "y", ("unchanged", "edited"))
    squares = [e for e in of_class(picture, "before") if e.tag.endswith("rect")]
    discs = [e for e in of_class(picture, "main") if e.tag.endswith("circle")]
    assert len(squares) == 1 and len(discs) == 2 and inside(picture)
    assert float(discs[1].get("cy")) == TOP, "1 is the top"
    rows = row_chart([("a & b", "before", before[0]), ("none", "control", Interval(None))], "t", "x", 0.1)
    (reference,), (square,) = of_class(rows, "reference"), of_class(rows, "mark")
    assert float(reference.get("x1")) == pytest.approx(float(square.get("x")) + 4, abs=0.2)
    assert "a &amp; b" in rows and inside(rows)


def test_numbers_are_written_as_in_print():
    assert (number(-0.5), number(1.0), share(0.254)) == ("−0.5", "1", "25 %")
