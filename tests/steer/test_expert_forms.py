"""What each form says of changes at routers, and what other programs' files refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from edits.lora.export import export_lora
from steer import control_vectors, lm_eval_files, wrap
from steer.coverage import Coverage, Row, coverage
from steer.form_table import Form
from steer.interventions import BiasRouter, Intervention, ScaleExperts
from steer.model import SteerableModel
from steer.operations import Matrix, Scale
from steer.patches import Patch
from steer.steering import Steering
from steer.subjects import open_subject
from tests import tiny
from tests.steer.made import refused

Folder = Callable[..., Path]
SCALE = ScaleExperts(((1, 2), (3, 0), (3, 1)), 64.0)
BIAS = BiasRouter(((1, 0, 1.0),), force_in=((3, 2),))


@cache
def model(family: str) -> SteerableModel:
    return wrap(*tiny.build(family), self_check=False)


def row(change: Intervention, family: str, form: Form) -> Row:
    (found,) = cover(change, family, form).rows
    return found


def cover(change: Intervention | Patch, family: str, form: Form) -> Coverage:
    return coverage(change if isinstance(change, Patch) else Steering((change,)), model(family), form)


@pytest.mark.parametrize("change", [SCALE, BIAS])
def test_a_hook_says_everything(change: ScaleExperts | BiasRouter) -> None:
    found = row(change, "qwen3_moe", "hook")
    assert (found.what, found.done, found.total, found.layers) == ("router", 2, 4, (1, 3))
    assert found.note == f"experts {len(change.experts)} of 2x4" and found.refused is None
    assert str(found).endswith(f"router 2/4 layers, experts {len(change.experts)} of 2x4")


@pytest.mark.parametrize("change", [SCALE, BIAS, ScaleExperts(((1, 0),), 2.0, renormalise=True)])
def test_vllm_has_rows_for_it_in_every_phase(change: Intervention) -> None:
    for phase in ("all", "thinking"):
        found = row(replace(change, phase=phase), "olmoe", "vllm")
        assert found.refused is None and found.done == len(change.active_layers) and "experts" in found.note


def test_a_patch_scales_what_experts_write() -> None:
    found = row(SCALE, "deepseek_v3", "patch")
    assert str(found) == "ScaleExperts at router: expert down 2/4 layers, experts 3 of 3x4, weight"
    assert row(SCALE, "gpt_oss", "patch").note == "experts 3 of 4x4, weight and bias"
    patch = Patch.from_steering(Steering((SCALE,)), model("gpt_oss"))
    assert [(each.matrix.key, each.factor) for each in patch.operations if isinstance(each, Scale)] == [
        (key, 64.0)
        for pair in ("1.expert_down.2", "3.expert_down.0", "3.expert_down.1")
        for key in (pair, f"{pair}.bias")
    ]
    rows = cover(patch, "gpt_oss", "patch").rows
    assert [(each.what, each.done, each.note) for each in rows] == [
        ("expert down", 2, "3 matrices"),
        ("expert down bias", 2, "3 matrices"),
    ]


def test_a_patch_of_experts_is_served_as_a_checkpoint_alone() -> None:
    patch = Patch.from_steering(Steering((SCALE,)), model("olmoe"))
    (found,) = cover(patch, "olmoe", "vllm").rows
    assert found.note == "as the patched checkpoint" and found.expressible


WRONG: list[tuple[Intervention, Form, tuple[str, ...]]] = [
    (ScaleExperts(((1, 0),), 2.0, renormalise=True), "patch", ("keep their sum", "hook form, or renormalise=False")),
    (ScaleExperts(((1, 0),), 2.0, phase="thinking"), "patch", ("phase 'thinking'", "hook form, or phase='all'")),
    (BIAS, "patch", ("which experts are chosen", "hook form", "ScaleExperts with beta 0")),
    (BiasRouter(force_out=((1, 0),), phase="answer"), "patch", ("phase 'answer'", "hook form")),
    (SCALE, "lora", ("full rank", "Use the patch or the hook form")),
    (ScaleExperts(((1, 0),), 2.0, renormalise=True), "lora", ("full rank", "Use the hook form")),
    (BIAS, "lora", ("which experts are chosen", "Use the hook form")),
]


@pytest.mark.parametrize(("change", "form", "words"), WRONG)
def test_what_weights_do_not_say(change: Intervention, form: Form, words: tuple[str, ...]) -> None:
    found = row(change, "olmoe", form)
    assert (found.expressible, found.done) == (False, 0)
    refused(cover(change, "olmoe", form).require, *words)
    if form == "patch":
        refused(lambda: Patch.from_steering(Steering((change,)), model("olmoe")), *words)


def test_without_a_model_nobody_knows_which_experts_have_biases() -> None:
    refused(lambda: Patch.from_steering(Steering((SCALE,))), "ScaleExperts at router", "known model")


@pytest.mark.parametrize("form", ["hook", "vllm", "patch", "lora"])
def test_a_dense_model_is_refused_whatever_the_form(form: Form) -> None:
    refused(lambda: cover(SCALE, "llama", form), "llama model is dense", "mixture of experts")


def test_no_adapter_is_made_of_scaled_experts(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("olmoe")
    patch = Patch.from_steering(Steering((SCALE,)), base)
    assert "scale is no change of low rank" in str(cover(patch, "olmoe", "lora"))
    for change in (Steering((SCALE,)), Steering((BIAS,)), patch):
        refused(lambda c=change: export_lora(c, base, tmp_path / "lora"), "hook form")  # type: ignore[misc]
    assert not (tmp_path / "lora").exists()


def test_files_of_other_programs_refuse_them_by_name(tmp_path: Path) -> None:
    for each, name in ((SCALE, "ScaleExperts at router"), (BIAS, "BiasRouter at router_logits")):
        steering = Steering((each,))
        refused(lambda s=steering: control_vectors.write(s, tmp_path / "v.gguf"), name, "control vector")  # type: ignore[misc]
        refused(lambda s=steering: lm_eval_files.write(s, tmp_path / "v.pt", model("olmoe").anatomy), name, "lm-eval")  # type: ignore[misc]


def test_as_part_of_a_subject(tiny_folder: Folder, tmp_path: Path) -> None:
    base, path = tiny_folder("olmoe"), Steering((SCALE,)).save(tmp_path / "up.yaml")
    ids = [[5, 9, 14, 22]]
    half = open_subject(f"{base}+{path}@0.5").run(ids)[0]
    by_hand = open_subject(str(base)).with_(Steering((ScaleExperts(SCALE.experts, 32.5),))).run(ids)[0]
    assert torch.equal(half, by_hand)
    assert torch.equal(open_subject(f"{base}+{path}@0").run(ids)[0], open_subject(str(base)).run(ids)[0])


def test_matrices_are_named_once() -> None:
    twice = Steering((ScaleExperts(((1, 2),), 2.0), ScaleExperts(((1, 2), (1, 3)), 4.0)))
    patch = Patch.from_steering(twice, model("olmoe"))
    factors = {
        matrix: [each.factor for each in found if isinstance(each, Scale)] for matrix, found in patch.matrices.items()
    }
    assert factors == {Matrix(1, "expert_down", 2): [2.0, 4.0], Matrix(1, "expert_down", 3): [4.0]}
