"""Steerings of routers: fingerprints, files, sentences, and what is refused on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import steer
from steer.anatomy.modules import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.interventions import Add, BiasRouter, Intervention, ScaleExperts
from steer.steering import Steering, sentence
from tests import tiny
from tests.steer.made import direction, identity, refused

SCALE = ScaleExperts(((3, 0), (2, 0)), 64.0)
BIAS = BiasRouter(((3, 0, 1.5), (1, 2, -0.5)), force_in=((2, 1),), force_out=((2, 3), (2, 0)), phase="thinking")


@cache
def anatomy(family: str) -> Anatomy:
    hf, _ = tiny.build(family)
    return resolve(hf.config.to_dict(), shapes_of(hf))


def test_both_are_the_packages_own() -> None:
    assert (steer.ScaleExperts, steer.BiasRouter) == (ScaleExperts, BiasRouter)


def test_everything_that_acts_changes_the_fingerprint() -> None:
    others: list[Intervention] = [
        replace(SCALE, experts=((3, 0),)),
        replace(SCALE, experts=((3, 0), (2, 1))),
        replace(SCALE, beta=2.0),
        replace(SCALE, renormalise=True),
        replace(SCALE, phase="thinking"),
        BIAS,
        replace(BIAS, bias=((3, 0, 1.5),)),
        replace(BIAS, bias=((3, 0, 1.25), (1, 2, -0.5))),
        replace(BIAS, force_in=()),
        replace(BIAS, force_out=((2, 3),)),
        replace(BIAS, phase="all"),
        BiasRouter(force_in=((2, 1),)),
        BiasRouter(force_out=((2, 1),)),
    ]
    prints = [Steering((each,)).fingerprint for each in (SCALE, *others)]
    assert len(set(prints)) == len(prints)


def test_what_does_not_act_does_not_change_it() -> None:
    base = Steering((SCALE,), model=identity(), name="up")
    again = Steering((ScaleExperts(((2, 0), (3, 0)), 64),))
    assert again.fingerprint == base.fingerprint


def test_vectors_id_leaves_beta_out_and_nothing_else() -> None:
    base = Steering((SCALE,))
    assert Steering((replace(SCALE, beta=2.0),)).vectors_id == base.vectors_id
    for other in (replace(SCALE, experts=((3, 0),)), replace(SCALE, renormalise=True), replace(SCALE, phase="answer")):
        assert Steering((other,)).vectors_id != base.vectors_id
    assert Steering((BIAS,)).vectors_id == Steering((BIAS,)).fingerprint


def test_scaled_goes_into_beta() -> None:
    (half,) = Steering((SCALE,)).scaled(0.5).interventions
    assert half == replace(SCALE, beta=1 + 0.5 * 63)
    assert ScaleExperts(((1, 0),), 0.1).factor(1.0) == 0.1, "unrounded, as the patch has it"
    assert Steering((SCALE,)).scaled(0.0).interventions[0].is_zero(1.0)
    assert Steering((SCALE,)).scaled(1.0) == Steering((SCALE,))
    twice = Steering((SCALE,)).scaled(0.5).scaled(0.25)
    assert twice.interventions[0] == replace(SCALE, beta=1 + 0.125 * 63)
    refused(lambda: Steering((SCALE,)).scaled(-1.0), "coefficient -1", "at least 0")
    refused(lambda: Steering((BIAS,)).scaled(0.5), "BiasRouter", "coefficient 1")
    assert Steering((BIAS,)).scaled(1.0) == Steering((BIAS,))


def test_numbers_that_float32_does_not_hold_are_refused() -> None:
    for beta in (1e300, 1e-42, float("nan"), float("inf")):
        refused(lambda beta=beta: ScaleExperts(((1, 0),), beta), "from 1e-30 to 1e30")
    refused(lambda: Steering((SCALE,)).scaled(1e300), "coefficient 1e+300", "from 1e-30 to 1e30")
    for added in (1e300, float("nan")):
        refused(lambda added=added: BiasRouter(bias=((1, 0, added),)), "from -1e30 to 1e30")
    assert ScaleExperts(((1, 0),), 1e30).factor(1.0) == 1e30 and ScaleExperts(((1, 0),), 0.0).factor(1.0) == 0


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_list_of_experts_is_refused_and_not_rounded() -> None:
    wrong: list[Any] = [(3, 0), 5, ((1.5, 0),), ((1,),), ((1, 0, 3),), (("1", 0),), ((-1, 0),)]
    for experts in wrong:
        refused(lambda experts=experts: ScaleExperts(experts, 2.0), "ScaleExperts names")
        refused(lambda experts=experts: BiasRouter(force_in=experts), "force_in, names")
    refused(lambda: ScaleExperts((3, 0), 2.0), "((3, 0),)")
    rows: list[Any] = [((1, 0),), (1, 0, 2.0), ((1.5, 0, 2.0),)]
    for bias in rows:
        refused(lambda bias=bias: BiasRouter(bias=bias), "bias, names")
    assert ScaleExperts(torch.tensor([[3, 0]]), 2.0).experts == ((3, 0),)


def test_no_directions_and_no_vectors_file(tmp_path: Path) -> None:
    steering = Steering((SCALE, BIAS), model=identity(), name="up")
    assert steering.directions == ()
    path = steering.save(tmp_path / "up.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["up.yaml"]
    loaded = Steering.load(path)
    assert loaded == steering
    assert loaded.fingerprint == steering.fingerprint
    document = yaml.safe_load(path.read_text())
    assert document["vectors"] is None
    assert document["interventions"] == [
        {"kind": "scale_experts", "experts": [[2, 0], [3, 0]], "beta": 64.0, "renormalise": False, "phase": "all"},
        {
            "kind": "bias_router", "bias": [[1, 2, -0.5], [3, 0, 1.5]], "force_in": [[2, 1]], "force_out": [[2, 0], [2, 3]],
            "phase": "thinking",
        },
    ]  # fmt: skip
    refused(lambda: steering.save(path), "exists")
    assert Steering.load(steering.save(path, overwrite=True)) == steering


def test_beside_a_direction(tmp_path: Path) -> None:
    d = direction(model=identity())
    steering = Steering((SCALE, Add(d, "attn_out", 0.5)))
    path = steering.save(tmp_path / "both.yaml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both.safetensors", "both.yaml"]
    assert Steering.load(path).fingerprint == steering.fingerprint
    assert Steering.load(path).model == identity()


EDITS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("experts", [[3]], ("[layer, expert]",)),
    ("experts", "3:0", ("[layer, expert]",)),
    ("experts", [[3, 0], [3, 0]], ("names an expert twice",)),
    ("experts", [], ("names no expert",)),
    ("beta", "64", ("a number", "quotes")),
    ("beta", -1.0, ("beta is -1",)),
    ("renormalise", 1, ("true or false",)),
    ("phase", "thinkin", ("no phase 'thinkin'",)),
    ("layers", [1], ("unknown key 'layers'",)),
    ("direction", 0, ("unknown key 'direction'",)),
]


@pytest.mark.parametrize(("key", "value", "words"), EDITS)
def test_files_that_a_reader_spoiled(tmp_path: Path, key: str, value: Any, words: tuple[str, ...]) -> None:
    path = Steering((SCALE,)).save(tmp_path / "up.yaml")
    document = yaml.safe_load(path.read_text())
    document["interventions"][0][key] = value
    path.write_text(yaml.safe_dump(document))
    refused(lambda: Steering.load(path), *words)


def test_more_files_that_a_reader_spoiled(tmp_path: Path) -> None:
    path = Steering((BIAS,)).save(tmp_path / "bias.yaml")
    document = yaml.safe_load(path.read_text())
    for wrong, words in [([[3, 0]], "[layer, expert, number]"), ([[3, 0, "x"]], "[layer, expert, number]")]:
        document["interventions"][0]["bias"] = wrong
        path.write_text(yaml.safe_dump(document))
        refused(lambda: Steering.load(path), words)
    document["interventions"][0] = {"kind": "add", "direction": 0, "site": "attn_out"}
    path.write_text(yaml.safe_dump(document))
    refused(lambda: Steering.load(path), "direction 0", "this file has none")
    document["interventions"][0] = {"kind": "scale_experts", "experts": [[3, 0]]}
    path.write_text(yaml.safe_dump(document))
    refused(lambda: Steering.load(path), "lacks beta")


def test_defaults_may_be_left_out(tmp_path: Path) -> None:
    path = Steering((SCALE,)).save(tmp_path / "up.yaml")
    document = yaml.safe_load(path.read_text())
    document["interventions"] = [
        {"kind": "scale_experts", "experts": [[3, 0]], "beta": 2},
        {"kind": "bias_router", "force_out": [[2, 1]]},
    ]
    path.write_text(yaml.safe_dump(document))
    assert Steering.load(path).interventions == (ScaleExperts(((3, 0),), 2.0), BiasRouter(force_out=((2, 1),)))


def test_sentences() -> None:
    assert sentence(SCALE) == "ScaleExperts at router, experts 2.0 3.0, beta 64"
    assert sentence(replace(SCALE, renormalise=True, phase="thinking")).endswith(
        "beta 64, renormalised, phase thinking"
    )
    said = "BiasRouter at router_logits, bias 1.2 -0.5 3.0 +1.5, forced in 2.1, forced out 2.0 2.3, phase thinking"
    assert sentence(BIAS) == said
    many = tuple((layer, expert) for layer in (1, 2, 5) for expert in range(5))
    assert sentence(ScaleExperts(many, 0.0)) == "ScaleExperts at router, experts 15 in layers 1-2, 5, beta 0"
    assert "forced out 15 in layers 1-2, 5" in sentence(BiasRouter(force_out=many))
    biased = BiasRouter(tuple((layer, expert, 1.0) for layer, expert in many))
    assert sentence(biased) == "BiasRouter at router_logits, bias of 15 experts"
    assert "experts 2.0 3.0, beta 64" in str(Steering((SCALE,)))
    assert "<li>ScaleExperts at router, experts 2.0 3.0, beta 64</li>" in Steering((SCALE,))._repr_html_()


Check = Callable[[], Intervention]
WRONG: list[tuple[str, Intervention, tuple[str, ...]]] = [
    ("llama", SCALE, ("names experts", "llama model is dense", "mixture of experts")),
    ("llama", BIAS, ("names experts", "mixture of experts")),
    ("qwen3_moe", SCALE, ("expert 0 of layer 2, which has no experts", "layers with experts: 1, 3")),
    ("olmoe", ScaleExperts(((4, 0),), 2.0), ("names layer 4", "layers 0 to 3")),
    ("olmoe", ScaleExperts(((3, 4),), 2.0), ("expert 4 of layer 3", "experts 0 to 3")),
    ("olmoe", BiasRouter(((1, 7, 1.0),)), ("expert 7 of layer 1", "experts 0 to 3")),
    ("olmoe", BiasRouter(force_in=((1, 0), (1, 1), (1, 2))), ("forces 3 experts of layer 1 in", "at most the 2")),
    (
        "olmoe",
        BiasRouter(force_out=((1, 0), (1, 1), (1, 2))),
        ("4 experts of layer 1 out that a token finds 1", "at least the 2"),
    ),
    ("deepseek_v3", BiasRouter(force_out=((1, 0), (1, 2))), ("a token finds 1", "all in 1 of its 2 groups")),
    (
        "deepseek_v3",
        BiasRouter(force_in=((1, 2),), force_out=((1, 3),)),
        ("a token finds 1", "all in 1 of its 2 groups"),
    ),
    ("deepseek_v3", BiasRouter(force_in=((1, 0), (1, 2))), ("2 groups of layer 1", "at most 1 of its 2 groups")),
]


@pytest.mark.parametrize(("family", "intervention", "words"), WRONG)
def test_what_a_model_cannot_choose(family: str, intervention: Intervention, words: tuple[str, ...]) -> None:
    refused(lambda: Steering((intervention,)).check(anatomy(family)), *words)


def test_what_a_model_can_choose() -> None:
    fits = [
        ("olmoe", SCALE),
        ("olmoe", BiasRouter(force_in=((1, 0), (1, 1), (2, 0)), force_out=((1, 2), (1, 3)))),
        ("deepseek_v3", BiasRouter(force_in=((1, 2), (1, 3)))),
        ("deepseek_v3", ScaleExperts(((1, 0), (1, 2)), 0.0)),
    ]
    for family, intervention in fits:
        Steering((intervention,)).check(anatomy(family))


def test_forcing_is_not_counted_where_the_record_does_not_say() -> None:
    unknown = replace(anatomy("olmoe"), chosen=0)
    Steering((BiasRouter(force_in=((1, 0), (1, 1), (1, 2))),)).check(unknown)
