from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer import artifacts
from steer.expert_scores import ExpertScores
from steer.scored_markers import ScoredMarker, formula
from tests.steer.made import SEEDS, identity, refused

LAYERS = (1, 3, 4)
MARKERS = (ScoredMarker("<think>", 1, 30, ((5,),), ("<think>",)), ScoredMarker("</think>", -1, 25))


def made(seed: int = 0, experts: int = 8, **changed: Any) -> ExpertScores:
    """Scores that nothing was counted for: only their places, numbers and counts matter here."""
    random = np.random.default_rng(seed)
    chosen = torch.from_numpy(random.integers(40, 90, (len(LAYERS), experts)))
    given: dict[str, Any] = {
        "values": torch.from_numpy(random.standard_normal((len(LAYERS), experts))),
        "layers": LAYERS,
        "chosen": chosen,
        "together": torch.from_numpy(random.integers(0, 26, (2, len(LAYERS), experts))),
        "tokens": 100,
        "markers": MARKERS,
        "method": "npmi",
    }
    return ExpertScores(**{**given, **changed})


def full(seed: int = 0) -> ExpertScores:
    base = made(seed)
    return replace(
        base,
        lower=base.values - 0.5,
        upper=base.values + 0.5,
        p_value=torch.sigmoid(-base.values.double()),
        q_value=torch.sigmoid(-base.values.double() / 2),
        model=identity(),
        provenance=artifacts.provenance(data_count=12, seed=3, options={"resamples": 10}),
    )


# Choosing.


@given(SEEDS, st.integers(1, 24))
def test_top_and_bottom_are_argsorts_by_the_models_layer_number(seed: int, n: int) -> None:
    scores = made(seed)
    order = np.argsort(-scores.values.numpy().ravel(), kind="stable")
    assert scores.top(n) == tuple((LAYERS[int(i) // 8], int(i) % 8) for i in order[:n])
    assert scores.bottom(n) == tuple((LAYERS[int(i) // 8], int(i) % 8) for i in order[::-1][:n])
    assert scores.top(24) == scores.ranked == scores.bottom(24)[::-1]


def test_ties_are_the_others_with_the_last_ones_score() -> None:
    values = torch.zeros(3, 8)
    values[0, 2], values[1, 3], values[2, 0], values[2, 1] = 1.0, 0.5, 0.5, 0.5
    scores = made(values=values)
    assert scores.top(2) == ((1, 2), (3, 3))
    assert scores.ties(1) == ()
    assert scores.ties(2) == ((4, 0), (4, 1))
    assert scores.ties(3) == ((4, 1),)
    assert scores.ties(4) == ()
    assert len(scores.ties(5)) == 19


def test_an_expert_is_asked_for_by_the_models_layer_number() -> None:
    scores = made()
    assert scores[3, 5] == float(scores.values[1, 5])
    refused(lambda: scores[2, 0], "no expert 0 in layer 2", "1, 3, 4")
    refused(lambda: scores[3, 8], "no expert 8", "0 to 7")
    refused(lambda: scores[3, -1], "no expert -1")


@pytest.mark.parametrize("n", [0, -1, 25])
def test_a_number_out_of_range_is_refused(n: int) -> None:
    for choose in (made().top, made().bottom, made().ties, lambda n: made().random(n, 0)):
        refused(lambda choose=choose: choose(n), "1 to 24")  # type: ignore[misc]


def test_experts_without_a_score_are_never_chosen() -> None:
    values = made().values.clone()
    values[1] = math.nan
    scores = made(values=values)
    assert len(scores.ranked) == 16
    assert all(layer != 3 for layer, _ in scores.ranked + scores.random(16, 0))
    assert len(scores.rows()) == 16
    refused(lambda: scores.matched([(3, 0)], 0), "layer 3", "no expert left")


@given(SEEDS, st.integers(1, 20))
def test_random_experts_are_others(seed: int, n: int) -> None:
    scores = made()
    drawn = scores.random(n, seed, exclude=scores.top(4))
    assert len(set(drawn)) == n
    assert not set(drawn) & set(scores.top(4))
    assert drawn == scores.random(n, seed, exclude=scores.top(4)) == tuple(sorted(drawn))


@given(SEEDS, st.integers(1, 4))
def test_matched_experts_are_the_nearest_of_their_layer(seed: int, n: int) -> None:
    scores = made(seed)
    named = scores.top(n)
    found = scores.matched(named, seed, exclude=scores.bottom(2))
    assert [layer for layer, _ in found] == [layer for layer, _ in named]
    assert len({*found, *named, *scores.bottom(2)}) == len(found) + len({*named, *scores.bottom(2)})

    def count(expert: tuple[int, int]) -> int:
        return int(scores.chosen[LAYERS.index(expert[0]), expert[1]])

    taken = {*named, *scores.bottom(2)}
    for one, other in zip(named, found, strict=True):
        left = [each for each in scores.ranked if each[0] == one[0] and each not in taken]
        assert abs(count(other) - count(one)) == min(abs(count(each) - count(one)) for each in left)
        taken.add(other)


def test_equally_near_experts_are_drawn_by_lot() -> None:
    scores = made(chosen=torch.full((3, 8), 50))
    drawn = [scores.matched([(1, 0)], seed)[0][1] for seed in range(700)]
    assert set(drawn) == set(range(1, 8))
    assert min(drawn.count(expert) for expert in range(1, 8)) > 60, "one in seven of 700: 100 expected"
    assert scores.matched([(1, 0)], 3) == scores.matched([(1, 0)], 3)


def test_more_experts_than_a_layer_can_match_are_refused() -> None:
    scores = made()
    refused(lambda: scores.matched([(1, expert) for expert in range(5)], 0), "layer 1 has no expert left")


# What cannot be.


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.full((3, 8), math.nan)}, "all missing"),
        ({"values": torch.full((3, 8), math.inf)}, "infinite"),
        ({"layers": (1, 3)}, "2 rows|3 rows"),
        ({"layers": (1, 1, 3)}, "increasing"),
        ({"layers": (3, 1, 4)}, "increasing"),
        ({"chosen": torch.full((3, 8), 101)}, "cannot be"),
        ({"chosen": torch.full((3, 8), 3)}, "cannot be"),
        ({"tokens": 10}, "cannot be"),
        ({"together": torch.full((2, 3, 8), 26)}, "cannot be"),
        ({"together": torch.full((2, 3, 8), -1)}, "cannot be"),
        ({"together": torch.zeros(1, 3, 8, dtype=torch.int64)}, "counts with markers"),
        ({"markers": MARKERS[:1]}, "counts with markers"),
        ({"markers": (replace(MARKERS[0], sign=0), MARKERS[1])}, "no weight"),
        ({"lower": torch.zeros(3, 8)}, "one end"),
        ({"lower": torch.ones(3, 8), "upper": torch.zeros(3, 8)}, "upside down"),
        ({"p_value": torch.full((3, 8), 1.5)}, "p_value.*0 to 1"),
        ({"q_value": torch.full((3, 8), math.nan)}, "q_value.*0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        made(**changed)


# Files and tables.


def test_a_file_gives_the_scores_back(tmp_path: Path) -> None:
    for number, scores in enumerate(
        (full(), made(3), made(markers=(), together=torch.zeros(0, 3, 8, dtype=torch.int64)))
    ):
        again = ExpertScores.load(scores.save(tmp_path / f"{number}.safetensors"))
        assert again == scores
        assert (again.layers, again.markers, again.method, again.tokens) == (
            scores.layers,
            scores.markers,
            scores.method,
            scores.tokens,
        )
        assert again.ranked == scores.ranked
    assert ExpertScores.load(tmp_path / "0.safetensors").provenance["options"] == {"resamples": 10}


def test_small_chances_survive_the_file(tmp_path: Path) -> None:
    chances = torch.full((3, 8), 1e-15, dtype=torch.float64)
    scores = made(p_value=chances, q_value=chances)
    again = ExpertScores.load(scores.save(tmp_path / "s.safetensors"))
    assert again.p_value is not None
    assert torch.equal(again.p_value, chances)


def test_equality_sees_every_number_and_every_name() -> None:
    changed = [
        made(),
        made(1),
        made(layers=(1, 3, 5)),
        made(method="pmi"),
        made(tokens=101),
        made(markers=(replace(MARKERS[0], variants=((6,),)), MARKERS[1])),
        made(p_value=torch.zeros(3, 8)),
        full(),
    ]
    assert len({scores.fingerprint for scores in changed}) == len(changed)
    assert full() == full()
    assert hash(full()) == hash(full())


def test_a_made_up_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    whole = {"values": made().values, "chosen": made().chosen, "together": made().together}
    content = {"layers": [1, 3, 4], "method": "npmi", "tokens": 100, "markers": []}
    for tensors, story in (
        ({"values": made().values}, {"content": content}),
        ({**whole, "more": made().values}, {"content": content}),
        (whole, {"content": {**content, "more": 1}}),
        (whole, {}),
    ):
        artifacts.write(path, "expert_scores", tensors, story, overwrite=True)
        refused(lambda: ExpertScores.load(path), "does not hold expert scores")
    artifacts.write(path, "expert_scores", whole, {"content": {**content, "markers": [{"text": "a", "weight": 1}]}}, overwrite=True)  # fmt: skip
    refused(lambda: ExpertScores.load(path), "'weight'")
    for key, value in (
        ("layers", ["a", 3, 4]),
        ("layers", [1.5, 3, 4]),
        ("layers", 5),
        ("tokens", "x"),
        ("tokens", 99.5),
        ("method", 3),
        ("markers", ["x"]),
    ):
        artifacts.write(path, "expert_scores", whole, {"content": {**content, key: value}}, overwrite=True)
        refused(lambda: ExpertScores.load(path), "does not hold expert scores")
    marker = {"text": "a", "sign": 1, "marked": 9, "variants": [[3]], "written": ["a"]}
    for name, wrong in (
        ("text", 7),
        ("sign", "x"),
        ("marked", 2.5),
        ("variants", 3),
        ("variants", [3]),
        ("written", [1]),
    ):
        for broken in ({**marker, name: wrong}, {key: marker[key] for key in marker if key != name}):
            artifacts.write(path, "expert_scores", whole, {"content": {**content, "markers": [broken]}}, overwrite=True)
            refused(lambda: ExpertScores.load(path), "a marker of the expert scores reads")
    artifacts.write(path, "scores", whole, {}, overwrite=True)
    refused(lambda: ExpertScores.load(path), "kind 'scores'")


def test_the_table_has_a_row_per_expert_best_first() -> None:
    scores = full()
    frame = scores.frame()
    shares = ["share", "share of <think>", "share of </think>"]
    assert list(frame.columns) == ["layer", "expert", "score", "lower", "upper", "p_value", "q_value", *shares]
    assert len(frame) == 24
    assert frame["score"].is_monotonic_decreasing
    for _, row in frame.iterrows():
        place = LAYERS.index(int(row["layer"])), int(row["expert"])
        assert row["score"] == scores.values[place].item()
        assert row["share"] == scores.chosen[place].item() / 100
        assert row["share of </think>"] == scores.together[1][place].item() / 25


def test_an_unknown_interval_is_shown_as_unknown() -> None:
    nothing = torch.full((3, 8), math.nan)
    assert made(lower=nothing, upper=nothing).rows()[0]["lower"] is None


def test_it_shows_itself() -> None:
    html = full()._repr_html_()
    assert html.count("<tr>") == 11
    assert "14 more experts" in html
    (layer, expert), *_ = full().top(1)
    assert f"best ({layer}, {expert})" in repr(full())
    assert "npmi of <think> - </think>" in repr(full())


def test_a_formula_is_written_as_one_would() -> None:
    assert formula([("a", 1), ("b", -1), ("c", 0.5)]) == "a - b + 0.5 c"
    assert formula([("a", -2)]) == "-2 a"


# Pictures.


def test_the_map_shows_the_scores_and_rings_the_chosen() -> None:
    scores = full()
    axes = scores.plot(scores.top(3)).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), scores.values.numpy())
    rings = np.asarray(axes.collections[0].get_offsets())
    assert {(LAYERS[int(row)], int(expert)) for expert, row in rings} == set(scores.top(3))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "3", "4"]
    assert axes.get_title() == "npmi of <think> - </think>"
    refused(lambda: scores.plot([(2, 0)]), "layer 2")


def test_the_volcano_shows_every_scored_expert_once() -> None:
    values = full().values.clone()
    values[0, 0] = math.nan
    scores = replace(full(), values=values)
    assert scores.q_value is not None
    q = np.where(np.isnan(values.numpy()), np.nan, scores.q_value.numpy())
    level = float(np.nanmedian(q))
    axes = scores.volcano(scores.top(2), level=level).axes[0]
    sizes = [len(np.asarray(part.get_offsets())) for part in axes.collections]
    assert sum(sizes) == 23
    assert sizes[1] == (q <= level).sum()
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        f"({layer}, {expert})" for layer, expert in scores.top(2)
    )
    refused(lambda: made().volcano(), "no p-values")


def test_names_of_neighbours_in_the_volcano_do_not_cover_each_other() -> None:
    values = torch.linspace(-1, 0, 24).reshape(3, 8)
    values[2, 3:] = torch.tensor([0.98, 0.99, 1.0, 1.01, 1.02])
    tiny = torch.full((3, 8), 1e-15, dtype=torch.float64)
    scores = made(values=values, p_value=tiny, q_value=tiny)
    figure = scores.volcano(scores.top(5))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in (*figure.axes[0].texts, figure.axes[0].title)]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
