from __future__ import annotations

import hashlib
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from steer import artifacts, steering_file
from steer.anatomy.modules import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.directions import Direction
from steer.identity import shape_id
from steer.interventions import Add, Custom, Intervention, ProjectOut, SetComponent, delta
from steer.steering import Steering
from tests import tiny
from tests.steer.made import SEEDS, direction, identity, refused

STRENGTHS = st.floats(-4, 4)
PHASE = st.sampled_from(["all", "prompt", "opening", "generated", "thinking", "answer"])
PLAIN_SITES = st.sampled_from(["resid_pre", "resid_mid", "resid_post", "attn_raw", "attn_out", "mlp_raw", "mlp_out"])
LAYERS = st.sets(st.sampled_from([1, 2, 5]), min_size=1).map(tuple)


Recipe = Callable[[], Intervention]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """What makes any intervention that can be saved; it is made inside the test, where type checks may draw numbers."""
    site = draw(PLAIN_SITES | st.sampled_from(["z", "head_out"]))
    seed, strength, phase = draw(st.integers(0, 2)), draw(STRENGTHS), draw(PHASE)
    kind = draw(st.sampled_from([Add, ProjectOut, SetComponent]))
    layers = draw(st.none() | LAYERS)
    heads = tuple(draw(st.sets(st.tuples(st.sampled_from([1, 2, 5]), st.integers(0, 7)), min_size=1, max_size=5)))

    def make() -> Intervention:
        d = direction(seed, site="z" if site == "z" else "resid_mid")
        if site == "head_out":
            return ProjectOut(d, site, strength, heads=heads, phase=phase)
        return kind(d, site, strength, layers=layers, phase=phase)

    return make


RECIPES = st.lists(recipes(), min_size=1, max_size=4)


def steering_of(each: list[Recipe]) -> Steering:
    return Steering(tuple(make() for make in each), name="drawn")


def example(c: float = 1.0) -> Steering:
    d = direction(model=identity())
    return Steering(
        (
            Add(d, "attn_out", 0.5 * c, layers=(1, 2)),
            ProjectOut(d, "head_out", c, heads=((5, 1), (2, 0))),
            SetComponent(d * 2.0, "resid_post", 3.0, phase="thinking"),
        ),
        name="example",
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return example().save(tmp_path / "s.yaml")


# Fingerprints.


def test_everything_that_acts_changes_the_fingerprint() -> None:
    d = direction()
    base = Add(d, "attn_out", 0.5, layers=(1, 2))
    others: list[Intervention] = [
        replace(base, site="mlp_out"),
        replace(base, coefficient=0.25),
        replace(base, coefficient=-0.5),
        replace(base, layers=(1, 5)),
        replace(base, layers=(1,)),
        replace(base, phase="thinking"),
        replace(base, direction=direction(1)),
        replace(base, direction=d * 1.000001),
        ProjectOut(d, "attn_out", 0.5, layers=(1, 2)),
        SetComponent(d, "attn_out", 0.5, layers=(1, 2)),
        ProjectOut(d, "head_out", 0.5, heads=((1, 0), (2, 0))),
        ProjectOut(d, "head_out", 0.5, heads=((1, 0), (2, 1))),
    ]
    prints = [Steering((each,)).fingerprint for each in (base, *others)]
    prints += [
        Steering((base, base)).fingerprint,
        Steering((base, others[0])).fingerprint,
        Steering((others[0], base)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_what_does_not_act_does_not_change_it() -> None:
    d = direction()
    base = Steering((Add(d, "attn_out", 0.5, layers=(1, 2)),))
    same = [
        replace(base, name="other"),
        replace(base, model=identity()),
        Steering((Add(d, "attn_out", 0.5, layers=(2, 1, 1)),)),
        Steering((Add(replace(d, provenance={"seed": 3}), "attn_out", 0.5, layers=(1, 2)),)),
        Steering((Add(d.only([1, 2]), "attn_out", 0.5),)),
    ]
    assert {each.fingerprint for each in same} == {base.fingerprint}


@settings(deadline=None)
@given(RECIPES, STRENGTHS, STRENGTHS)
def test_vectors_id_is_the_fingerprint_without_strengths(each: list[Recipe], a: float, b: float) -> None:
    steering = steering_of(each)

    def stronger(c: float) -> Steering:
        each = [
            replace(
                i, **({"coefficient": c} if isinstance(i, Add) else {"weight": c} if isinstance(i, ProjectOut) else {})
            )
            for i in steering.interventions
        ]
        return replace(steering, interventions=tuple(each))

    assert stronger(a).vectors_id == stronger(b).vectors_id == steering.vectors_id
    fixed = all(isinstance(each, SetComponent) for each in steering.interventions)
    assert (stronger(a).fingerprint == stronger(b).fingerprint) == (fixed or a == b)


def test_vectors_id_sees_all_but_strength() -> None:
    d = direction()
    base = Add(d, "attn_out", 0.5)
    others: list[Intervention] = [
        replace(base, site="mlp_out"),
        replace(base, layers=(1,)),
        replace(base, phase="prompt"),
        replace(base, direction=direction(1)),
        ProjectOut(d, "attn_out"),
        SetComponent(d, "attn_out", 1.0),
        SetComponent(d, "attn_out", 2.0),
    ]
    assert len({Steering((each,)).vectors_id for each in (base, *others)}) == len(others) + 1
    assert Steering((base,)).vectors_id != Steering((base,)).fingerprint


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    code = "from tests.steer.test_steering import example; print(example().fingerprint, example().vectors_id)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == [example().fingerprint, example().vectors_id]


def test_the_fingerprint_is_this_hash() -> None:
    """The recipe by hand: files in the field depend on it, so it changes with the format version only."""

    def sha(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).hexdigest()

    tensor = sha(b'["vectors","torch.float32",[1,2]]', struct.pack("<2f", 1.0, 2.0))
    vectors = sha(b'{"layers":[3],"site":"resid_mid"}', tensor.encode())
    row = f'"direction":"{vectors}","kind":"add","layers":[3],"phase":"all","site":"attn_out"}}]'
    steering = Steering((Add(Direction(torch.tensor([[1.0, 2.0]]), (3,), "resid_mid"), "attn_out", 0.5),))
    assert steering.fingerprint == sha(f'[{{"coefficient":0.5,{row}'.encode())
    assert steering.vectors_id == sha(f"[{{{row}".encode())


def test_a_custom_function_has_no_fingerprint_and_no_file(tmp_path: Path) -> None:
    steering = Steering((Add(direction(), "attn_out"), Custom(lambda h, layer: h, "attn_out", (0,))))
    assert not steering.has_fingerprint
    assert example().has_fingerprint
    refused(lambda: steering.fingerprint, "Custom", "no fingerprint")
    refused(lambda: steering.vectors_id, "Custom")
    refused(lambda: steering.save(tmp_path / "s.yaml"), "cannot be saved")
    assert not list(tmp_path.iterdir())


# Files.


@settings(deadline=None, max_examples=40)
@given(RECIPES)
def test_a_file_gives_the_steering_back(tmp_path_factory: pytest.TempPathFactory, each: list[Recipe]) -> None:
    steering = steering_of(each)
    again = Steering.load(steering.save(tmp_path_factory.mktemp("s") / "s.yaml"))
    assert again == steering
    assert (again.fingerprint, again.vectors_id, again.name) == (steering.fingerprint, steering.vectors_id, "drawn")


def test_equal_steerings_are_equal_bytes(saved: Path, tmp_path: Path) -> None:
    again = Steering.load(saved).save(tmp_path / "again.yaml")
    assert again.read_bytes() == saved.read_bytes()
    assert again.with_suffix(".safetensors").read_bytes() == saved.with_suffix(".safetensors").read_bytes()


def test_both_files_have_mode_0644_and_nothing_else_is_there(saved: Path) -> None:
    assert {path.name: oct(path.stat().st_mode)[-4:] for path in saved.parent.iterdir()} == {
        "s.yaml": "0644",
        "s.safetensors": "0644",
    }


def test_a_shared_direction_is_stored_once(saved: Path) -> None:
    assert set(artifacts.read(saved.with_suffix(".safetensors"), "steering").tensors) == {"0", "1"}
    assert Steering.load(saved).model == identity()


@pytest.mark.parametrize("taken", ["s.yaml", "s.safetensors"])
def test_neither_file_is_replaced_unasked(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    refused(lambda: example().save(tmp_path / "s.yaml"), taken, "exists already")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    example().save(tmp_path / "s.yaml", overwrite=True)
    assert Steering.load(tmp_path / "s.yaml") == example()


def test_the_order_of_keys_does_not_matter(saved: Path) -> None:
    document = yaml.safe_load(saved.read_text())
    document["interventions"] = [dict(reversed(row.items())) for row in document["interventions"]]
    saved.write_text(yaml.safe_dump(dict(reversed(document.items())), sort_keys=False))
    assert Steering.load(saved).fingerprint == example().fingerprint


def test_a_reader_may_change_a_number(saved: Path) -> None:
    saved.write_text(saved.read_text().replace("coefficient: 0.5", "coefficient: 2"))
    changed = Steering.load(saved)
    assert changed.interventions[0].coefficient == 2.0
    assert changed.fingerprint != example().fingerprint
    assert changed.vectors_id == example().vectors_id


def test_defaults_may_be_left_out(saved: Path) -> None:
    lines = [line for line in saved.read_text().splitlines() if "phase: all" not in line]
    saved.write_text("\n".join(lines))
    assert Steering.load(saved) == example()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format_version: 1", "format_version: 2", ("version 2",)),
        ("format_version: 1\n", "", ("version None",)),
        ("kind: steering", "kind: patch", ("kind 'patch'",)),
        ("name: example", "title: example", ("'title'",)),
        ("name: example", "name: [1]", ("name",)),
        ("kind: add", "kind: ad", ("'ad'", "intervention 0", "project_out")),
        ("kind: add", "kind: custom", ("'custom'",)),
        ("kind: add", "kind: [add]", ("unknown kind",)),
        ("coefficient: 0.5", "coeficient: 0.5", ("'coeficient'", "intervention 0")),
        ("coefficient: 0.5", "weight: 0.5", ("'weight'",)),
        ("coefficient: 0.5", "coefficient: .nan", ("coefficient is nan",)),
        ("coefficient: 0.5", "coefficient: 1e-3", ("1.0e-3",)),
        ("site: attn_out", "site: router", ("experts are chosen",)),
        ("  site: attn_out\n", "", ("lacks site",)),
        ("phase: thinking", "phase: thinkin", ("no phase 'thinkin'",)),
        ("layers: [1, 2]", "layers: [1, 3]", ("layer 3", "1-2, 5")),
        ("layers: [1, 2]", "layers: [1, '2']", ("layers of intervention 0",)),
        ("layers: [1, 2]", "layers: []", ("no layers",)),
        ("[2, 0]", "[3, 0]", ("layer 3",)),
        ("[2, 0]", "[2, -1]", ("from 0",)),
        ("[2, 0]", "[2]", ("heads of intervention 1",)),
        ("direction: 1", "direction: 2", ("direction 2", "0 to 1")),
        ("direction: 1", "direction: -1", ("direction -1",)),
        ("direction: 1", "direction: true", ("direction True",)),
        ("family: llama", "famly: llama", ("model identity",)),
        ("value: 3.0", "value: !!python/object/apply:os.getcwd []", ("safely",)),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named(saved: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    text = saved.read_text()
    assert old in text, text
    saved.write_text(text.replace(old, new))
    refused(lambda: Steering.load(saved), *words)


def test_the_two_files_belong_together(saved: Path, tmp_path: Path) -> None:
    Steering((Add(direction(9), "attn_out"),)).save(tmp_path / "other.yaml")
    (tmp_path / "other.safetensors").replace(saved.with_suffix(".safetensors"))
    refused(lambda: Steering.load(saved), "other vectors", "together")
    saved.with_suffix(".safetensors").unlink()
    refused(lambda: Steering.load(saved), "no file", "s.safetensors")


def test_another_artifact_beside_the_yaml_is_refused(saved: Path) -> None:
    direction().save(saved.with_suffix(".safetensors"), overwrite=True)
    refused(lambda: Steering.load(saved), "kind 'direction'", "kind 'steering'")


def test_only_yaml_names(tmp_path: Path) -> None:
    refused(lambda: example().save(tmp_path / "s.safetensors"), ".yaml")
    refused(lambda: Steering.load(tmp_path / "s.safetensors"), ".yaml")
    refused(lambda: Steering.load(tmp_path / "no.yaml"), "no file")


@pytest.mark.faults
def test_a_run_cut_between_the_files_is_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, text: str, overwrite: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steering_file, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        Steering((Add(direction(9), "attn_out"),)).save(saved, overwrite=True)
    refused(lambda: Steering.load(saved), "other vectors")


# Strength.


@given(SEEDS, STRENGTHS)
def test_scaling_is_the_request_coefficient(seed: int, c: float) -> None:
    d = direction(seed)
    steering = Steering((Add(d, "attn_out", 0.7), ProjectOut(d, "mlp_out", 0.3)))
    h = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 12)))
    for one, other in zip(steering.interventions, steering.scaled(c).interventions, strict=True):
        np.testing.assert_allclose(delta(one, 1, h, c).numpy(), delta(other, 1, h).numpy(), rtol=1e-10, atol=1e-12)


def test_scaling_keeps_heads_and_refuses_what_has_no_strength() -> None:
    scaled = Steering((ProjectOut(direction(), "head_out", heads=((1, 2),)),)).scaled(0.5)
    assert scaled.interventions[0] == ProjectOut(direction(), "head_out", 0.5, heads=((1, 2),))
    assert example().scaled(1.0) == example()
    refused(lambda: example().scaled(0.5), "SetComponent", "leave the coefficient out")
    refused(lambda: Steering((Add(direction(), "attn_out"),)).scaled(math.inf), "finite")


# Models.


@cache
def anatomy(family: str = "llama") -> Anatomy:
    model = tiny.build(family).model
    return resolve(model.config.to_dict(), shapes_of(model))


def fitting(site: str = "resid_mid", layers: tuple[int, ...] = (1, 3), seed: int = 0, **given_: Any) -> Direction:
    shape = (len(layers), 4, 16) if site == "z" else (len(layers), 48)
    return Direction(torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)), layers, site, **given_)


def test_what_fits_is_accepted() -> None:
    qwen = anatomy("qwen3")
    here = identity(shape_id(qwen.numbers()))
    d = fitting(model=here)
    Steering(
        (
            Add(d, "attn_out"),
            ProjectOut(d, "head_out", heads=((3, 3),)),
            Add(fitting("z"), "z"),
            Custom(lambda h, layer: h, "attn_out", (3,)),
        )
    ).check(qwen, here)


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        (lambda: Steering((Add(fitting(layers=(1, 4)), "attn_out"),)), ("layer 4", "0 to 3")),
        (
            lambda: Steering((Add(fitting(), "attn_out"), Custom(lambda h, layer: h, "attn_out", (4,)))),
            ("Custom", "layer 4"),
        ),
        (lambda: Steering((ProjectOut(fitting(), "head_out", heads=((3, 4),)),)), ("head 4", "0 to 3")),
        (lambda: Steering((Add(direction(layers=(1, 2)), "attn_out"),)), ("(12,)", "(48,)")),
        (lambda: Steering((Add(direction(layers=(1, 2), site="z"), "z"),)), ("(3, 5)", "(4, 16)")),
    ],
)
def test_what_does_not_fit_is_named(steering: Callable[[], Steering], words: tuple[str, ...]) -> None:
    refused(lambda: steering().check(anatomy("qwen3")), *words)


def test_the_head_width_is_the_projections() -> None:
    d = fitting("z")
    Steering((Add(d, "z"),)).check(anatomy("qwen3"))
    refused(lambda: Steering((Add(d, "z"),)).check(anatomy("llama")), "(4, 16)", "(4, 12)")


def test_layers_that_are_not_used_may_be_out_of_range() -> None:
    Steering((Add(fitting(layers=(1, 9)), "attn_out", layers=(1,)),)).check(anatomy())


def test_another_models_steering_is_refused() -> None:
    steering = Steering((Add(fitting(model=identity(name="made for")), "attn_out"),), name="short")
    refused(
        lambda: steering.check(anatomy(), identity("d" * 64, name="at hand")),
        "the steering 'short'",
        "made for",
        "at hand",
    )
    with pytest.warns(UserWarning, match="other weights"):
        steering.check(anatomy(), identity(weights="d" * 64))


def test_directions_of_two_models_make_no_steering() -> None:
    refused(
        lambda: Steering(
            (
                Add(direction(model=identity()), "attn_out"),
                Add(direction(model=identity("d" * 64, name="big")), "attn_out"),
            )
        ),
        "tiny",
        "big",
    )
    refused(lambda: Steering((Add(direction(model=identity()), "attn_out"),), model=identity("d" * 64)), "two models")
    assert Steering((Add(direction(), "attn_out"), Add(direction(model=identity()), "attn_out"))).model == identity()


def test_an_empty_steering_is_refused() -> None:
    refused(lambda: Steering(()), "no intervention")


# The reader's view.


def test_it_shows_itself() -> None:
    assert str(example()) == (
        "steering 'example', 3 interventions\n"
        "  Add at attn_out, layers 1-2, coefficient 0.5\n"
        "  ProjectOut at head_out, heads 2.0 5.1, weight 1\n"
        "  SetComponent at resid_post, layers 1-2, 5, value 3, phase thinking"
    )
    html = Steering((Custom(lambda h, layer: h, "z", (0,)),), name="<b>")._repr_html_()
    assert "<b>" not in html
    assert "Custom at z, layers 0" in html
