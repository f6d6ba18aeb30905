"""Curves of reasoning vectors: which models are asked, what is told, and what the picture shows."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import edits
import steer
from experiments import vectors
from experiments.curve import Curve
from experiments.vector_figure import draw
from experiments.vectors import BASE, SUPERVISED, TUNED, Bench, change, curve_dict, layer_effects
from tests.experiments.made import run

AT = (-1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def vector():
    return edits.reasoning_vector(TUNED, SUPERVISED)


@pytest.fixture(scope="module")
def sibling():
    return steer.load(BASE)


def curve(rows, name="vector"):
    return Curve(name, AT, tuple(run([10 + n] * len(row), row.tolist()) for n, row in enumerate(rows)))


def rights(seed, *shares, questions=60):
    rng = np.random.default_rng(seed)
    return [rng.random(questions) < share for share in shares]


def test_the_rise_is_the_line_through_the_accuracies():
    rows = rights(0, 0.2, 0.5, 0.7)
    found = curve(rows).rise()
    assert found.value == pytest.approx(np.polyfit(AT, [row.mean() for row in rows], 1)[0])
    assert 0 < found.low < found.value < found.high


def test_a_control_that_rises_as_well_takes_the_rise_away():
    made, flat = curve(rights(1, 0.2, 0.5, 0.7)), curve(rights(2, 0.5, 0.5, 0.5))
    assert made.rise_beyond([made]).value == 0.0
    assert made.rise_beyond([flat]).value == pytest.approx(made.rise().value - flat.rise().value)
    assert made.slope_beyond([made]).value == 0.0


def test_a_change_is_paired_over_questions():
    before, after = run([1] * 4, [True, False, False, False]), run([1] * 4, [True, True, False, False])
    assert change(before, after).value == 0.25 and change(after, before).value == -0.25


def test_a_curve_is_told_point_by_point():
    rows = rights(3, 0.2, 0.5, 0.7)
    told = curve_dict(curve(rows), curve(rows).runs[1])
    assert [point["alpha"] for point in told["points"]] == list(AT)
    assert [point["accuracy"]["value"] for point in told["points"]] == pytest.approx(
        [row.mean() for row in rows], abs=1e-6
    )
    assert told["points"][1]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_every_layer_is_asked_alone_without_and_at_random(sibling, vector):
    """Layers alone and all others together make up the vector."""
    asked = {}

    def bench(view, name):
        asked[name] = {operation.matrix for patch, _ in view.changes for operation in patch.operations}
        return run([10, 10], [True, False])

    plain = run([10, 10], [False, False])
    found = layer_effects(sibling, vector, plain, plain, bench)
    everything = set(vector.differing)
    assert [effect.layer for effect in found] == [-1, 0, 1, 2, 3, 4, 5]
    for word in ("outside", *map(str, range(6))):
        assert asked[f"alone-{word}"] == asked[f"random-alone-{word}"] == everything - asked[f"without-{word}"]
        assert asked[f"alone-{word}"]
    assert set.union(*(asked[name] for name in asked if name.startswith("alone"))) == everything
    assert all(effect.alone.value == 0.5 and effect.norm > 0 for effect in found)


def test_less_survives_of_less(vector):
    rows = [vectors.survival_dict(vector, alpha) for alpha in (1.0, 0.1)]
    for larger, smaller in pairwise(rows):
        assert smaller["lost"] > larger["lost"] and smaller["unchanged"] > larger["unchanged"]


def test_a_bench_takes_the_run_that_is_there(sibling, tmp_path):
    bench = Bench(tmp_path, questions=2, samples=1)
    first = bench(sibling, "plain")
    before = (tmp_path / "plain" / "traces.jsonl").stat().st_mtime_ns
    assert bench(sibling, "plain").traces == first.traces
    assert (tmp_path / "plain" / "traces.jsonl").stat().st_mtime_ns == before


def test_the_program_measures_tells_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "ALPHAS", (0.0, 1.0))
    monkeypatch.setattr(vectors, "SEEDS", (11,))
    monkeypatch.setattr(vectors, "layer_effects", lambda *_: ())
    monkeypatch.setattr(vectors, "SMALL", (1.0,))
    threads = torch.get_num_threads()
    vectors.main(["--out", str(tmp_path), "--questions", "2", "--samples", "1"])
    torch.set_num_threads(threads)
    told = json.loads((tmp_path / "result.json").read_text())
    assert [curve["name"] for curve in told["curves"]] == ["vector", "bfloat16", "random-11"]
    one = {"value": 0.1, "low": 0.0, "high": 0.2}
    layers = [{"layer": layer, "alone": one, "without": one, "random": one} for layer in (-1, 0)]
    for name in ("picture.png", "picture.svg"):
        draw({**told, "layers": layers}, tmp_path / name)
    text = (tmp_path / "picture.svg").read_text("utf-8")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in text
