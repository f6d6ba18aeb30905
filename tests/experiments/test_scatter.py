from itertools import combinations

import pytest

from experiments.scatter import LINE, Spot, scatter
from tests.experiments.test_charts import inside, of_class


def made(spots, **options):
    return scatter(spots, "t", "score", "−log10 p", **options)


def test_points_lie_where_their_values_are():
    picture = made([Spot(0.0, 0.0, "control", "a"), Spot(1.0, 5.0, "after", "b"), Spot(2.0, 10.0, "main", "c <d>")], level=5.0)  # fmt: skip
    marks = of_class(picture, "mark")
    x, y = ([float(disc.get(name)) for disc in marks] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    (level,) = of_class(picture, "reference")
    assert float(level.get("y1")) == pytest.approx(y[1], abs=0.1)
    assert "c &lt;d&gt;" in picture and inside(picture) and of_class(picture, "rank") == []


def test_labels_cover_neither_each_other_nor_the_edge():
    spots = [Spot(2.0 - 0.01 * n, 15.0, "main", "w", f"({n}, {n})") for n in range(5)] + [Spot(-2.0, 1.0, "after", "w", "(10, 127)")]  # fmt: skip
    picture = made(spots)
    labels = of_class(picture, "rank")
    assert len(labels) == 6 and inside(picture)
    for one, other in combinations(labels, 2):
        (x1, y1), (x2, y2) = ((float(e.get("x")), float(e.get("y"))) for e in (one, other))
        assert abs(y1 - y2) >= LINE - 0.1 or abs(x1 - x2) > 30


def test_points_without_width_or_height_are_drawn():
    assert inside(made([Spot(1.0, 0.0, "control", "w")]))
