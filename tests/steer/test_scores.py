from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from steer import artifacts
from steer.scores import HeadScores
from tests.steer.made import SEEDS, identity, refused


def values(seed: int = 0, layers: int = 4, heads: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((layers, heads))).float()


def full(seed: int = 0) -> HeadScores:
    base = values(seed)
    return HeadScores(
        base,
        base - 0.5,
        base + 0.25,
        torch.sigmoid(-base),
        0.8,
        identity(),
        artifacts.provenance(data_count=12, seed=3),
    )


# Choosing.


@given(SEEDS, st.integers(1, 24))
def test_top_and_bottom_are_argsorts(seed: int, n: int) -> None:
    scores = HeadScores(values(seed))
    order = np.argsort(-scores.values.numpy().ravel(), kind="stable")
    assert scores.top(n) == tuple((int(i) // 6, int(i) % 6) for i in order[:n])
    assert scores.bottom(n) == tuple((int(i) // 6, int(i) % 6) for i in order[::-1][:n])
    assert scores.top(24) == scores.ranked == scores.bottom(24)[::-1]


@given(SEEDS)
def test_turning_the_scores_round_swaps_top_and_bottom(seed: int) -> None:
    scores = HeadScores(values(seed))
    assert HeadScores(-scores.values).top(5) == scores.bottom(5)


def test_equal_scores_come_in_order_of_layer_and_head() -> None:
    scores = HeadScores(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert scores.ranked == ((0, 1), (1, 0), (0, 0), (1, 1))


def test_heads_are_plain_numbers() -> None:
    ((layer, head),) = HeadScores(values()).top(1)
    assert type(layer) is int
    assert type(head) is int


@pytest.mark.parametrize(
    ("layers", "heads", "share", "count"),
    [
        (28, 12, 0.04, 13),
        (32, 32, 0.04, 41),
        (4, 6, 0.04, 1),
        (4, 6, 0.001, 1),
        (5, 5, 0.1, 3),
        (4, 6, 1.0, 24),
        (2, 25, 0.05, 3),
        (2, 25, 0.03, 2),
    ],
)
def test_a_share_is_rounded_halves_up_and_never_none(layers: int, heads: int, share: float, count: int) -> None:
    scores = HeadScores(values(1, layers, heads))
    assert scores.share(share) == scores.top(count)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_lies_between_none_and_all(share: float) -> None:
    refused(lambda: HeadScores(values()).share(share), "share", "at most 1")


@pytest.mark.parametrize("n", [0, -1, 25])
def test_a_number_out_of_range_is_refused(n: int) -> None:
    scores = HeadScores(values())
    refused(lambda: scores.top(n), "1 to 24")
    refused(lambda: scores.bottom(n), "1 to 24")
    refused(lambda: scores.random(n, 0), "1 to 24")


@given(SEEDS, st.integers(1, 20))
def test_random_heads_are_others(seed: int, n: int) -> None:
    scores = full()
    chosen = scores.top(4)
    drawn = scores.random(n, seed, exclude=chosen)
    assert len(set(drawn)) == n
    assert not set(drawn) & set(chosen)
    assert list(drawn) == sorted(drawn)
    assert drawn == scores.random(n, seed, exclude=chosen)


def test_random_heads_are_drawn_evenly() -> None:
    scores = HeadScores(values())
    counts = dict.fromkeys(scores.ranked, 0)
    for seed in range(1200):
        for place in scores.random(4, seed, exclude=scores.top(4)):
            counts[place] += 1
    left = [count for place, count in counts.items() if place not in scores.top(4)]
    assert min(left) > 190
    assert max(left) < 290, "4 of 20 in 1200 draws: 240 expected"
    assert sum(counts.values()) == 4800


def test_too_few_heads_to_draw_from() -> None:
    refused(lambda: full().random(3, 0, exclude=full().top(22)), "2 are left")


def test_missing_scores_are_never_chosen() -> None:
    holes = values()
    holes[1] = math.nan
    scores = HeadScores(holes)
    assert len(scores.ranked) == 18
    assert all(layer != 1 for layer, _ in scores.ranked + scores.random(18, 0))
    refused(lambda: scores.top(19), "18 are scored")


# Refusals.


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(4),
        torch.zeros(1, 2, 3),
        torch.full((2, 2), math.nan),
        torch.tensor([[math.inf, 0.0]]),
        torch.zeros(0, 4),
    ],
)
def test_what_is_no_map_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(Exception, match=r"head scores|layer head"):
        HeadScores(bad)


def test_what_does_not_fit_the_scores_is_refused() -> None:
    base = values()
    with pytest.raises(Exception, match="upper"):
        HeadScores(base, base, base[:2])
    refused(lambda: HeadScores(base, base + 1, base), "upside down")
    refused(lambda: HeadScores(base, base), "one end")
    refused(lambda: HeadScores(base, p_value=base), "0 to 1")
    refused(lambda: HeadScores(base, p_value=torch.full_like(base, math.nan)), "p_value", "NaN")
    refused(lambda: HeadScores(base, stability=1.5), "stability")
    refused(lambda: HeadScores(base, stability=math.nan), "stability")


# Files and tables.


def test_a_file_gives_the_scores_back(tmp_path: Path) -> None:
    for number, scores in enumerate((full(), HeadScores(values(3)), HeadScores(values(), stability=0.1))):
        again = HeadScores.load(scores.save(tmp_path / f"{number}.safetensors"))
        assert again == scores
        assert again.fingerprint == scores.fingerprint
        assert (again.stability, again.model, again.top(5)) == (scores.stability, scores.model, scores.top(5))
    assert HeadScores.load(tmp_path / "0.safetensors").provenance["data_count"] == 12


def test_equality_sees_every_number() -> None:
    base = full()
    changed = [
        HeadScores(values(1)),
        HeadScores(values()),
        HeadScores(values(), values() - 1, values() + 1),
        HeadScores(values(), stability=0.5),
        HeadScores(values(), stability=0.6),
    ]
    assert len({scores.fingerprint for scores in (base, *changed)}) == 6
    assert base == full()
    assert hash(base) == hash(full())
    assert base != "scores"


def test_a_made_up_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    content = {"stability": None}
    for tensors, story in (
        ({"v": values()}, {"content": content}),
        ({"values": values(), "more": values()}, {"content": content}),
        ({"values": values()}, {"content": {}}),
        ({"values": values()}, {}),
    ):
        artifacts.write(path, "scores", tensors, story, overwrite=True)
        refused(lambda: HeadScores.load(path), "does not hold head scores")
    artifacts.write(path, "direction", {"values": values()}, {}, overwrite=True)
    refused(lambda: HeadScores.load(path), "kind 'direction'")


def test_the_table_has_a_row_per_head_best_first() -> None:
    frame = full().frame()
    assert list(frame.columns) == ["layer", "head", "score", "lower", "upper", "p_value"]
    assert len(frame) == 24
    assert frame["score"].is_monotonic_decreasing
    first = frame.iloc[0]
    assert first["score"] == full()[int(first["layer"]), int(first["head"])]
    assert list(HeadScores(values()).frame().columns) == ["layer", "head", "score"]


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    refused(lambda: full().frame(), "pandas", "notebook")
    assert full().rows()[0]["score"] == full()[full().top(1)[0]]


def test_it_shows_itself() -> None:
    html = full()._repr_html_()
    assert html.count("<tr>") == 11
    assert "14 more heads" in html
    (layer, head), *_ = full().top(1)
    assert repr(full()).startswith(f"HeadScores(4 layers x 6 heads; best ({layer}, {head})")
    assert repr(HeadScores(torch.zeros(1, 1))) == "HeadScores(1 layers x 1 heads; best (0, 0) 0)"


# The map.


def test_the_map_shows_the_scores_and_outlines_the_chosen() -> None:
    scores = full()
    axes = scores.plot(scores.top(3), title="Heads").axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), scores.values.numpy())
    frames = {
        (round(box.get_y() + 0.5), round(box.get_x() + 0.5)) for box in axes.patches if isinstance(box, Rectangle)
    }
    assert frames == set(scores.top(3))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("head", "layer", "Heads")
    low, high = axes.images[0].get_clim()
    assert low == -high == -float(scores.values.abs().max())


def test_a_map_can_be_saved_whatever_the_size(tmp_path: Path) -> None:
    for layers, heads in ((1, 1), (2, 3), (64, 40)):
        scores = HeadScores(torch.zeros(layers, heads) if layers == 1 else values(0, layers, heads))
        scores.plot().savefig(tmp_path / "map.png")
        assert (tmp_path / "map.png").stat().st_size > 1000


def test_drawing_leaves_pyplot_alone() -> None:
    full().plot()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("place", [(4, 0), (0, 6), (-1, 0)])
def test_a_head_that_does_not_exist_is_not_outlined(place: tuple[int, int]) -> None:
    refused(lambda: full().plot([place]), "no head", "layers 0 to 3")
