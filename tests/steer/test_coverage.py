from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from steer import wrap
from steer.anatomy.forms import reaches
from steer.coverage import Coverage, coverage
from steer.directions import Direction
from steer.form_table import Form
from steer.identity import ModelIdentity
from steer.interventions import Add, Custom, Intervention, ProjectOut, ScaleExperts, SetComponent
from steer.model import SteerableModel
from steer.operations import AddBias, AddDense, AddLowRank, Matrix, Scale, SetSlice
from steer.patches import Patch, ProjectColumns
from steer.steering import Steering
from tests import tiny
from tests.steer.made import CAN_BIAS, refused

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite")
NORMED = ("gemma2", "gemma3_text", "olmo2")
TIED = ("qwen2", "smollm3", "gemma2", "gemma3_text")
LAYERS = (0, 1, 2, 3)


@cache
def model(family: str) -> SteerableModel:
    return wrap(*tiny.build(family), self_check=False)


def v(site: str = "resid_mid", layers: tuple[int, ...] = LAYERS, seed: int = 0) -> Direction:
    width = (4, 16) if site == "z" else (48,)
    return Direction(torch.from_numpy(np.random.default_rng(seed).standard_normal((len(layers), *width))), layers, site)


def heads(*pairs: tuple[int, int], seed: int = 0, weight: float = 1.0) -> ProjectOut:
    return ProjectOut(v(seed=seed), "head_out", weight, heads=pairs)


def cover(change: Intervention | Steering | Patch, family: str, form: Form) -> Coverage:
    return coverage(change if isinstance(change, Steering | Patch) else Steering((change,)), model(family), form)


def verdict(intervention: Intervention, family: str, form: Form) -> str:
    """How the table answers: `yes`, `no`, or `part` of the layers."""
    answers = {row.expressible for row in cover(intervention, family, form).rows}
    return "part" if len(answers) == 2 else "yes" if answers == {True} else "no"


# The table of DESIGN §4, row by row: (intervention, {family group: (vllm, patch, lora)}).
Answers = tuple[str, str, str]
TABLE: list[tuple[str, Intervention, dict[str, Answers]]] = [
    ("ThinkEdit", heads((1, 2)), {"plain": ("yes", "yes", "yes"), "normed": ("yes", "yes", "yes")}),
    ("Add attn_out", Add(v(), "attn_out"), {"plain": ("yes", "yes", "no"), "normed": ("yes", "no", "no")}),
    ("Add mlp_out", Add(v(), "mlp_out"), {"plain": ("yes", "yes", "no"), "normed": ("yes", "no", "no")}),
    ("Add attn_raw", Add(v(), "attn_raw"), {"plain": ("no", "yes", "no"), "normed": ("no", "yes", "no")}),
    ("Add mlp_raw", Add(v(), "mlp_raw"), {"plain": ("no", "yes", "no"), "normed": ("no", "yes", "no")}),
    ("ProjectOut attn_out", ProjectOut(v(), "attn_out"), {"plain": ("yes", "yes", "yes"), "normed": ("yes", "no", "no")}),
    ("ProjectOut mlp_out", ProjectOut(v(), "mlp_out"), {"plain": ("yes", "yes", "yes"), "normed": ("yes", "no", "no")}),
    ("Add resid_post", Add(v(), "resid_post"), {"plain": ("yes", "yes", "no"), "normed": ("yes", "no", "no")}),
    ("Add resid_mid", Add(v(), "resid_mid"), {"plain": ("yes", "yes", "no"), "normed": ("yes", "no", "no")}),
    ("ProjectOut resid_post", ProjectOut(v(), "resid_post"), {"plain": ("yes", "no", "no"), "normed": ("yes", "no", "no")}),
    ("phase", Add(v(), "attn_out", phase="thinking"), {"plain": ("yes", "no", "no"), "normed": ("yes", "no", "no")}),
    ("phase", ProjectOut(v(), "attn_out", phase="prompt"), {"plain": ("yes", "no", "no"), "normed": ("yes", "no", "no")}),
    ("SetComponent", SetComponent(v(), "attn_out", 1.0), {"plain": ("no", "no", "no"), "normed": ("no", "no", "no")}),
    ("Custom", Custom(lambda h, layer: h, "attn_out", (0,)), {"plain": ("no", "no", "no"), "normed": ("no", "no", "no")}),
]  # fmt: skip


@pytest.mark.parametrize("group", ["plain", "normed"])
@pytest.mark.parametrize(("name", "intervention", "answers"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table(name: str, intervention: Intervention, answers: dict[str, Answers], group: str) -> None:
    for family in PLAIN if group == "plain" else NORMED:
        found = {form: verdict(intervention, family, form) for form in ("vllm", "patch", "lora")}
        expected = dict(zip(("vllm", "patch", "lora"), answers[group], strict=True))
        if family == "llama" and name in ("ProjectOut attn_out", "ProjectOut mlp_out"):
            expected["lora"] = "no"  # The biases of this one have a component along the direction.
        in_mlp = intervention.site in ("mlp_raw", "mlp_out", "resid_post")
        if isinstance(intervention, Add) and not CAN_BIAS[family][in_mlp]:
            expected["patch"] = "no"  # No checkpoint of the family can hold the bias.
        assert found == expected, family


@pytest.mark.parametrize("family", [*PLAIN, *NORMED])
def test_the_hook_form_says_everything(family: str) -> None:
    for _, intervention, _ in TABLE:
        found = cover(intervention, family, "hook")
        assert found.ok
        found.require()
        assert [(row.done, row.total) for row in found.rows] == [(len(intervention.active_layers), 4)]


def test_a_bias_along_the_direction_stops_an_adapter_layer_by_layer() -> None:
    changed = wrap(*tiny.build("llama"), self_check=False)
    project = ProjectOut(v(), "attn_out")
    with torch.no_grad():
        for layer in (1, 3):
            bias = changed.places.layers[layer].attention_output.bias
            unit = v().unit()[layer]
            bias -= (bias @ unit) * unit
    rows = coverage(Steering((project,)), changed, "lora").rows
    assert {row.layers: row.expressible for row in rows} == {(1, 3): True, (0, 2): False}
    assert "bias" in str(rows[1].refused)


def test_taking_a_direction_out_of_every_writer() -> None:
    writers = Steering(
        (ProjectOut(v(), "resid_pre", layers=(0,)), ProjectOut(v(), "attn_out"), ProjectOut(v(), "mlp_out"))
    )
    for family in (*PLAIN, *NORMED):
        answers = {form: [row.expressible for row in cover(writers, family, form).rows] for form in ("patch", "lora")}
        untied, linear = family not in TIED, family not in NORMED
        assert answers["patch"] == [untied, linear, linear], family
        if family != "llama":
            assert answers["lora"] == [untied, linear, linear], family
    row = cover(writers, "qwen2", "patch").rows[0]
    assert (row.what, row.done, row.total) == ("embedding", 0, 1)
    assert "tied" in str(row.refused)
    later = cover(ProjectOut(v(), "resid_pre", layers=(1,)), "qwen3", "patch").rows[0]
    assert "every writer" in str(later.remedy)


def test_layers_with_experts_have_no_single_mlp_projection() -> None:
    assert model("qwen3_moe").anatomy.dense_mlp_layers == (0, 2)
    for site in ("mlp_raw", "mlp_out", "resid_post"):
        assert verdict(Add(v(), site), "qwen3_moe", "patch") == "no"
    assert verdict(ProjectOut(v(), "mlp_raw"), "qwen3_moe", "patch") == "part"
    for form in ("patch", "lora"):
        found = cover(ProjectOut(v(), "mlp_out"), "qwen3_moe", form)
        assert found.ok and [(row.layers, row.done) for row in found.rows] == [((0, 2), 2), ((1, 3), 2)]
    assert "4 matrices a layer" in str(cover(ProjectOut(v(), "mlp_out"), "qwen3_moe", "patch").rows[1])
    assert verdict(Add(v(), "mlp_out"), "qwen3_moe", "hook") == "yes"
    found = cover(Add(v(), "mlp_raw"), "qwen3_moe", "hook")
    assert [(row.layers, row.done, row.total, row.expressible) for row in found.rows] == [
        ((0, 2), 2, 4, True),
        ((1, 3), 0, 4, False),
    ]
    assert "experts" in str(found.rows[1].refused)
    refused(found.require, "Add at mlp_raw", "hook", "experts", "mlp_out")


@pytest.mark.parametrize(
    ("intervention", "family", "form", "remedy"),
    [
        (Add(v(), "attn_out"), "gemma2", "patch", "attn_raw"),
        (Add(v(), "mlp_out"), "olmo2", "patch", "mlp_raw"),
        (Add(v(), "resid_post"), "gemma3_text", "patch", "mlp_raw"),
        (Add(v("z"), "z"), "qwen3", "patch", "attn_raw"),
        (Add(v(), "resid_pre"), "qwen3", "patch", "resid_post"),
        (Add(v(), "attn_out", phase="answer"), "qwen3", "patch", "phase='all'"),
        (Add(v(), "attn_out"), "qwen3", "lora", "hook"),
        (SetComponent(v(), "attn_out", 1.0), "qwen3", "vllm", "hook"),
        (Add(v(), "attn_raw"), "qwen3", "vllm", "hook"),
    ],
)
def test_every_refusal_has_reason_and_remedy(intervention: Intervention, family: str, form: Form, remedy: str) -> None:
    (row,) = cover(intervention, family, form).rows
    assert not row.expressible
    assert row.done == 0
    assert row.refused
    assert remedy in str(row.remedy)
    refused(cover(intervention, family, form).require, type(intervention).__name__, form, remedy)


# What vLLM runs is what it has rows for, alone and together.


@pytest.mark.parametrize(
    ("interventions", "word"),
    [
        ((Add(v(), "mlp_out"), ProjectOut(v(), "mlp_out")), "ProjectOut comes after Add"),
        ((Add(v(), "mlp_out", phase="prompt"), Add(v(), "mlp_out", phase="answer")), "in the phases answer, prompt"),
        ((ProjectOut(v(), "resid_post"), ProjectOut(v(), "resid_post")), "one after the other"),
        ((Add(v(), "resid_mid"), ProjectOut(v(), "attn_out"), Add(v(), "attn_out", phase="prompt")), "phases"),
    ],
)
def test_vllm_refuses_what_does_not_fit_into_one_request(interventions: tuple[Intervention, ...], word: str) -> None:
    found = cover(Steering(interventions), "qwen3", "vllm")
    assert not any(row.expressible or row.done for row in found.rows)
    refused(found.require, word)
    assert all(cover(each, "qwen3", "vllm").ok for each in interventions)


def test_vllm_runs_heads_as_weights_beside_the_rest() -> None:
    found = cover(Steering((Add(v(), "mlp_out"), heads((0, 0)), Add(v(), "mlp_out"))), "qwen3", "vllm")
    assert found.ok and [row.note for row in found.rows] == [
        "",
        "as the patched checkpoint, or per request as LoRA",
        "",
    ]
    phased = cover(replace(heads((0, 0)), phase="thinking"), "qwen3", "vllm")
    assert "no heads" in str(phased.rows[0].refused) and "steer" in str(phased.rows[0].remedy)


def test_thinkedit_has_a_hook_form_and_a_patch_form_everywhere() -> None:
    for family in (*PLAIN, *NORMED, "qwen3_moe"):
        for form in ("hook", "patch"):
            found = cover(heads((3, 0), (1, 2), (1, 3)), family, form)
            assert found.ok
            assert str(found.rows[0]) == "ProjectOut at head_out: attention output 2/4 layers, 3 heads"


def test_the_rank_is_the_number_of_distinct_directions_in_a_layer() -> None:
    one = heads((1, 0), (1, 1), (2, 3))
    same = replace(one, direction=one.direction * -3.0)
    other = heads((1, 2), seed=1)
    third = heads((2, 2), seed=1)

    def rank(*each: Intervention) -> list[str]:
        return [row.note for row in cover(Steering(each), "qwen3", "lora").rows]

    assert rank(one) == ["rank 1"]
    assert rank(one, same) == ["rank 1", "rank 1"]
    assert rank(one, other) == ["rank 2", "rank 2"]
    assert rank(one, third, heads((1, 2), seed=2)) == ["rank 2", "rank 2", "rank 2"]
    assert rank(ProjectOut(v(), "mlp_out"), one) == ["rank 1", "rank 1"]


# Patches.


def patch_of(*pairs: tuple[int, tuple[int, ...]], seed: int = 0, **given: Any) -> Patch:
    return Patch(
        tuple(ProjectColumns(layer, "attention_output", which, v(seed=seed)[layer]) for layer, which in pairs), **given
    )


def test_a_patch_and_its_hook_form_are_covered_alike() -> None:
    patch = patch_of((1, (0, 2)), (3, (1,)))
    for form in get_args(Form):
        direct, hooked = cover(patch, "qwen3", form), cover(patch.steering(), "qwen3", form)
        assert [(row.done, row.total, row.layers, row.refused, row.note) for row in direct.rows] == [
            (row.done, row.total, row.layers, row.refused, row.note) for row in hooked.rows
        ]
    assert str(cover(patch, "qwen3", "patch").rows[0]) == "patch: attention output 2/4 layers, 3 heads"


def test_overlapping_operations_raise_the_rank() -> None:
    both = Patch((*patch_of((1, (0,))).operations, *patch_of((1, (0, 1)), seed=1).operations))
    assert cover(both, "qwen3", "lora").rows[0].note == "rank 2"
    noted = "2 heads; 1 matrix is touched more than once; the order matters on 1"
    assert cover(both, "qwen3", "patch").rows[0].note == noted


def test_every_operation_has_a_patch_form_and_few_another() -> None:
    down = Matrix(2, "mlp_output")
    patch = Patch(
        (
            ProjectColumns(1, "mlp_output", None, v()[1]),
            AddLowRank(down, torch.ones(3, 64), torch.ones(48, 3)),
            AddDense(Matrix(-1, "model.norm.weight"), torch.ones(48, 1)),
            AddBias(0, "attention_output", v()[0]),
            Scale(Matrix(-1, "head"), 2.0),
            SetSlice(Matrix(0, "attention_output"), (0, 1), (0, 1), torch.ones(1, 1)),
        )
    )
    answers = {
        form: {row.what: row.refused is None for row in cover(patch, "qwen3", form).rows}
        for form in ("patch", "lora", "hook")
    }
    names = ["tensors by name", "head", "attention output", "attention output bias", "mlp output"]
    assert sorted(answers["patch"]) == sorted(names) and all(answers["patch"].values())
    assert [name for name in names if answers["lora"][name]] == ["mlp output"]
    assert not any(answers["hook"].values())
    rows = {row.what: row for row in cover(patch, "qwen3", "lora").rows}
    assert rows["mlp output"].note == "rank 4" and "--rank" in str(rows["tensors by name"].remedy)
    wrong = Patch((AddLowRank(down, torch.ones(3, 60), torch.ones(48, 3)),))
    refused(lambda: cover(wrong, "qwen3", "patch"), "shape")


def test_what_the_anatomy_does_not_have_is_refused_by_name() -> None:
    refused(lambda: cover(Patch((Scale(Matrix(1, "expert_down", 9), 0.0),)), "qwen3_moe", "patch"), "experts 0 to 3")
    refused(lambda: cover(Patch((Scale(Matrix(0, "expert_down", 1), 0.0),)), "qwen3_moe", "patch"), "no expert_down")
    refused(lambda: cover(patch_of((0, (1,))), "qwen3_next", "patch"), "linear attention", "heads=None")
    assert cover(patch_of((1, (1,))), "qwen3_next", "patch").ok


def test_biases_of_experts_stop_an_adapter() -> None:
    project = ProjectOut(v(), "mlp_out")
    assert cover(project, "gpt_oss", "patch").ok and cover(project, "mixtral", "lora").ok
    refused(cover(project, "gpt_oss", "lora").require, "bias has a component along the direction")


def test_a_patch_for_another_model_is_refused() -> None:
    refused(lambda: cover(patch_of((3, (4,))), "qwen3", "patch"), "head 4")
    wide = Direction(torch.ones(1, 8), (0,), "resid_mid")
    refused(lambda: cover(Patch((ProjectColumns(0, "attention_output", (0,), wide[0]),)), "qwen3", "patch"), "8")
    refused(
        lambda: cover(patch_of((0, (0,)), model=ModelIdentity("big", "llama", "d" * 64)), "qwen3", "patch"),
        "the patch",
        "big",
    )


# Targets.


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize("form", get_args(Form))
def test_headers_and_the_loaded_model_answer_alike(family: str, form: Form, tiny_folder: Callable[..., Path]) -> None:
    everything = Steering(tuple(intervention for _, intervention, _ in TABLE))
    from_folder = coverage(everything, tiny_folder(family), form)
    assert from_folder == coverage(everything, str(tiny_folder(family)), form) == cover(everything, family, form)


def test_quantised_weights_have_no_patch(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    folder.mkdir()
    for file in tiny_folder("qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    for change in (Steering((heads((0, 0)),)), patch_of((0, (0,)))):
        found = coverage(change, folder, "patch")
        assert not found.ok
        refused(found.require, "quantised (bitsandbytes)", "hook")
        assert coverage(change, folder, "hook").ok


def test_a_steering_that_does_not_fit_is_refused(tiny_folder: Callable[..., Path]) -> None:
    refused(lambda: coverage(Steering((Add(v(layers=(0, 7)), "attn_out"),)), tiny_folder("qwen3")), "layer 7", "0 to 3")
    other = Steering((Add(replace(v(), model=ModelIdentity("big", "llama", "d" * 64)), "attn_out"),))
    refused(lambda: coverage(other, tiny_folder("qwen3")), "big")


def test_unknown_forms_and_folders_are_refused(tmp_path: Path, unchecked_types: None) -> None:
    form: Any = "magic"
    refused(
        lambda: coverage(Steering((Add(v(), "attn_out"),)), model("qwen3"), form),
        "no form 'magic'",
        "hook, vllm, patch, lora",
    )
    refused(lambda: coverage(Steering((Add(v(), "attn_out"),)), tmp_path / "none"), "none")


# The reader's view.


def test_it_shows_itself() -> None:
    found = cover(Steering((Add(v(), "attn_out"), heads((1, 2)))), "gemma2", "patch")
    assert str(found) == (
        "patch form, 1 of 2 parts\n"
        "  Add at attn_out: attention output bias 0/4 layers: refused, "
        "a norm (post_attention_layernorm) stands between the bias and attn_out. Use attn_raw, in front of the norm.\n"
        "  ProjectOut at head_out: attention output 1/4 layers, 1 head"
    )
    html = found._repr_html_()
    assert html.count("<tr>") == 3
    assert "not everything" in html
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps({"form": "patch", "ok": False, "rows": data["rows"]}))
    assert data["rows"][1]["done"] == 1


@pytest.mark.parametrize("family", [*PLAIN, *NORMED, "qwen3_moe"])
def test_the_outline_that_inspect_prints_says_the_same(family: str) -> None:
    kinds = {"Add": Add, "ProjectOut": ProjectOut}
    scaled = ScaleExperts(tuple((layer, 1) for layer in model(family).anatomy.expert_layers) or ((0, 0),), 2.0)
    for reach in reaches(model(family).anatomy):
        kind, _, site = reach.change.partition(" at ")
        change: Intervention = scaled
        if kind in kinds:
            change = heads(*((layer, 0) for layer in LAYERS)) if site == "head_out" else kinds[kind](v(), site)
        form: Any = reach.form
        rows = cover(change, family, form).rows
        reached = sum(len(row.layers) for row in rows if row.expressible)
        if "bias has no component" in reach.why:  # The outline does not read biases.
            assert reached <= reach.layers
            continue
        assert (reached, rows[0].total) == (reach.layers, reach.total), reach
        assert (sum(row.done for row in rows) > 0) == (reach.layers > 0), reach


def test_its_table_has_a_row_per_part() -> None:
    found = cover(Steering((Add(v(), "attn_out"), heads((1, 2)))), "gemma2", "patch")
    frame = found.frame()
    known = frame.astype(object).where(frame.notna(), None).to_dict("records")
    assert known == [{"form": "patch"} | asdict(row) for row in found.rows]
    assert list(frame["refused"].isna()) == [False, True]
    assert list(frame["done"]) == [0, 1]
    assert list(Coverage("hook", ()).frame().columns) == list(frame.columns)


def test_tensors_by_name_and_what_lies_outside_the_layers_are_counted(tiny_folder):
    folder = tiny_folder("qwen3")
    names = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight", "model.norm.weight")
    shapes = ((64, 48), (16, 1), (48, 1))
    added = [AddDense(Matrix(-1, name), torch.ones(shape)) for name, shape in zip(names, shapes, strict=True)]
    head, by_name = coverage(
        Patch((*added, AddDense(Matrix(-1, "head"), torch.ones(len(tiny.WORDS), 48)))), folder, "patch"
    ).rows
    assert (by_name.done, by_name.total, by_name.layers) == (1, 4, (1,)) and by_name.note == "3 matrices"
    assert (head.done, head.total) == (1, 1)


def test_a_patch_that_no_checkpoint_can_hold_is_refused_before_it_is_written() -> None:
    turned = ProjectColumns(-1, "embedding", None, v()[0])
    for operation in (turned, Scale(Matrix(-1, "head"), 2.0)):
        refused(cover(Patch((operation,)), "qwen2", "patch").require, "tied", "--untie")
        assert cover(Patch((operation,)), "qwen3", "patch").ok
    dense = AddDense(Matrix(-1, "head"), torch.ones(len(tiny.WORDS), 48))
    assert cover(Patch((dense,)), "qwen2", "patch").ok
    bias = Patch((AddBias(0, "attention_output", v()[0]),))
    refused(cover(bias, "qwen2", "patch").require, "qwen2 models load no bias there", "hook")
    assert cover(bias, "qwen3", "patch").ok and cover(bias.scaled(0), "qwen2", "patch").ok
    expert = Patch((AddBias(1, "expert_down", v()[0], expert=0),))
    refused(cover(expert, "qwen3_moe", "patch").require, "load no bias")
    assert cover(expert, "gpt_oss", "patch").ok


def test_a_projected_bias_has_no_adapter_unless_there_is_nothing_to_project() -> None:
    changed = wrap(*tiny.build("llama"), self_check=False)
    steering = Steering((ProjectOut(v(layers=(1,)), "attn_out"),))
    patch = Patch.from_steering(steering, changed)
    rows = {row.what: row.refused for row in coverage(patch, changed, "lora").rows}
    assert rows == {"attention output": None, "attention output bias": "an adapter holds no bias"}
    with torch.no_grad():
        bias = changed.places.layers[1].attention_output.bias
        unit = v(layers=(1,)).unit()[1]
        bias -= (bias @ unit) * unit
    assert coverage(patch, changed, "lora").ok and coverage(steering, changed, "lora").ok
