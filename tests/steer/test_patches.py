"""Patches in memory: exact while open, exact again afterwards, refused where the weights are not there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer import artifacts
from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import Add, ProjectOut
from steer.operations import ProjectColumns, edited, tensor_hash
from steer.patches import Patch
from steer.steering import Steering
from tests import tiny
from tests.edits.material import FAMILIES, HIDDEN, attention_output, matrix, patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loaded(family: str = "qwen3", **options: Any) -> steer.SteerableModel:
    return steer.wrap(*tiny.build(family, **options), self_check=False)


def hashes(model: steer.SteerableModel) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in model.hf.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_edits_the_named_columns_and_gives_every_byte_back(family: str) -> None:
    model, change = loaded(family), patch()
    before = hashes(model)
    width = model.anatomy.head_width
    expected = {
        layer: edited(attention_output(model.hf, layer), change.matrices[matrix(layer)], width) for layer in (0, 2)
    }
    with change.on(model) as survival:
        inside = hashes(model)
        for layer, weight in expected.items():
            assert torch.equal(attention_output(model.hf, layer), weight)
            columns = (
                (attention_output(model.hf, layer) != tiny.build(family).model.state_dict()[_name(layer)])
                .any(0)
                .nonzero()
                .flatten()
            )
            heads = {column // width for column in columns.tolist()}
            assert heads == ({1, 3} if layer == 0 else {0})
        assert survival[matrix(0)].share == pytest.approx(1)
    assert {name for name in before if before[name] != inside[name]} == {_name(0), _name(2)}
    assert hashes(model) == before


def _name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.o_proj.weight"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_return_in_every_dtype_after_an_exception(dtype: torch.dtype) -> None:
    model = loaded(dtype=dtype)
    before = hashes(model)
    with pytest.raises(ZeroDivisionError), patch().on(model):
        assert hashes(model) != before
        raise ZeroDivisionError
    assert hashes(model) == before


def test_scale_zero_keeps_every_byte_and_scale_multiplies_the_weight() -> None:
    model, change = loaded(), patch(weight=0.8)
    before = hashes(model)
    with change.on(model, scale=0):
        assert hashes(model) == before
    with change.on(model, scale=0.5):
        scaled = hashes(model)
    with patch(weight=0.4).on(model):
        assert hashes(model) == scaled
    assert change.scaled(0.5) == patch(weight=0.4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_contexts_may_end_in_any_order(order: tuple[int, ...]) -> None:
    """While some are open, the weights are the originals under exactly those, in order of opening."""
    model = loaded(dtype=torch.bfloat16)
    before = hashes(model)
    patches = [
        patch(seed=seed, heads=heads)
        for seed, heads in enumerate([((0, (1, 3)),), ((0, (3,)), (2, (0,))), ((0, (0, 3)),)])
    ]
    contexts = [change.on(model) for change in patches]
    for context in contexts:
        context.__enter__()
    left = set(range(3))
    for index in order:
        contexts[index].__exit__(None, None, None)
        left.discard(index)
        operations = tuple(operation for which in sorted(left) for operation in patches[which].operations)
        if operations:
            together = Patch(operations)
            fresh = loaded(dtype=torch.bfloat16)
            with together.on(fresh):
                assert hashes(model) == hashes(fresh)
    assert hashes(model) == before


def test_the_same_patch_twice_is_two_contexts() -> None:
    model, change = loaded(), patch(weight=0.5)
    before = hashes(model)
    with change.on(model):
        once = hashes(model)
        with change.on(model):
            assert hashes(model) != once
        assert hashes(model) == once
    assert hashes(model) == before


def test_nothing_is_left_on_the_model() -> None:
    model = loaded()
    attributes = {name: set(vars(module)) for name, module in model.hf.named_modules()}
    parameter = attention_output(model.hf, 0)
    with patch().on(model):
        assert attention_output(model.hf, 0) is parameter
    assert {name: set(vars(module)) for name, module in model.hf.named_modules()} == attributes


def test_a_loaded_model_does_not_change_its_file(tmp_path: Path) -> None:
    """Parameters of a freshly loaded model map the file: an edit in memory must stay there."""
    hf, tokenizer = tiny.build("llama")
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = steer.load(tmp_path / "m")
    with patch().on(model):
        assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_view_enters_its_patch_with_its_coefficient() -> None:
    model, change = loaded(), patch()
    ids = [[5, 6, 7, 8]]
    with change.on(model, 0.5):
        expected = model.run(ids)[0]
    assert torch.equal(model.with_(change, coefficient=0.5).run(ids)[0], expected)
    assert not torch.equal(model.run(ids)[0], expected)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))],
)
def test_bytes_are_the_same_on_every_device(device: str) -> None:
    model = loaded(dtype=torch.bfloat16)
    with patch().on(model):
        expected = hashes(model)
    model.hf.to(device)
    with patch().on(model):
        assert hashes(model) == expected


def test_offloaded_and_quantised_weights_are_refused_with_a_remedy() -> None:
    for change, word in ((lambda w: w.to("meta"), "offloaded"), (lambda w: w.to(torch.int8), "quantised")):
        model = loaded()
        module = model.hf.model.layers[2].self_attn.o_proj
        module.weight = torch.nn.Parameter(change(module.weight.detach()), requires_grad=False)
        before = tensor_hash(attention_output(model.hf, 0))
        with pytest.raises(SteerError, match=word) as caught, patch().on(model):
            pass
        assert "steering" in caught.value.remedy
        assert tensor_hash(attention_output(model.hf, 0)) == before


def test_another_shape_and_what_is_out_of_range_are_refused() -> None:
    model = loaded()
    other = Patch(patch().operations, loaded("llama").identity)
    with pytest.raises(SteerError, match="made for"), other.on(model):
        pass
    for heads, word in ((((0, (4,)),), "heads 0 to 3"), (((4, (0,)),), "layer")):
        with pytest.raises(SteerError, match=word), patch(heads).on(model):
            pass
    with pytest.raises(SteerError, match="rows"), patch(hidden=HIDDEN + 1).on(model):
        pass


def test_a_patch_without_operations_is_refused() -> None:
    with pytest.raises(SteerError, match="no operation"):
        Patch(())


# Files.


def test_a_file_gives_the_same_patch_back(tmp_path: Path) -> None:
    identity = loaded().identity
    made = Patch(
        patch().operations, identity, {matrix(0): "sha256:00"}, {"site": "resid_mid", "seed": 3, "options": {"a": 1}}
    )
    made.save(tmp_path / "p.safetensors")
    again = Patch.load(tmp_path / "p.safetensors")
    assert again == made and hash(again) == hash(made)
    assert (again.model, again.expects) == (identity, made.expects)
    assert (again.provenance["site"], again.provenance["seed"], again.provenance["options"]) == (
        "resid_mid",
        3,
        {"a": 1},
    )
    assert all(torch.equal(x.vector, y.vector) for x, y in zip(again.operations, made.operations, strict=True))  # type: ignore[attr-defined]
    assert (tmp_path / "p.safetensors").stat().st_mode & 0o777 == 0o644


def test_unknown_operations_and_other_kinds_are_refused(tmp_path: Path) -> None:
    row = {"operation": "rotate", "matrix": "0.attention_output", "heads": [0], "weight": 1.0}
    content = {"operations": [row], "expects": {}}
    artifacts.write(
        tmp_path / "a.safetensors",
        "patch",
        {"operation.0.vector": torch.ones(3)},
        artifacts.provenance(content=content),
    )
    with pytest.raises(SteerError, match="rotate"):
        Patch.load(tmp_path / "a.safetensors")
    content = {"operations": [row | {"operation": "project_out", "strength": 2}], "expects": {}}
    artifacts.write(
        tmp_path / "b.safetensors",
        "patch",
        {"operation.0.vector": torch.ones(3)},
        artifacts.provenance(content=content),
    )
    with pytest.raises(SteerError, match="strength"):
        Patch.load(tmp_path / "b.safetensors")
    Direction(torch.ones(1, 4), (0,), "resid_mid").save(tmp_path / "d.safetensors")
    with pytest.raises(SteerError, match="direction"):
        Patch.load(tmp_path / "d.safetensors")


def test_fingerprint_counts_what_is_done_and_not_where_it_came_from() -> None:
    made = patch()
    assert (
        made.fingerprint == Patch(made.operations[::-1], loaded().identity, provenance={"seed": 1}).fingerprint
    )  # Two layers.
    overlapping = [ProjectColumns(0, "attention_output", (1,), torch.eye(HIDDEN)[index]) for index in (0, 1)]
    assert Patch(tuple(overlapping)) != Patch(tuple(overlapping[::-1]))
    assert len({patch(weight=w, seed=s).fingerprint for w in (1, 0.5) for s in (1, 2)}) == 4
    assert made != "patch"


# The hook form.


def test_hook_form_and_back_is_the_same_patch() -> None:
    vectors = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    operations = (
        ProjectColumns(0, "attention_output", (1, 2), vectors[0]),
        ProjectColumns(2, "attention_output", (0,), vectors[1], 0.5),
        ProjectColumns(0, "attention_output", (2,), vectors[2]),
    )
    steering = Patch(operations).steering()
    assert all(isinstance(each, ProjectOut) and each.site == "head_out" for each in steering.interventions)
    assert Patch.from_steering(steering) == Patch(operations)


def test_layers_that_share_a_weight_are_one_intervention() -> None:
    assert len(patch().steering().interventions) == 1
    assert patch().steering().interventions[0].heads == ((0, 1), (0, 3), (2, 0))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "intervention",
    [
        lambda d: Add(d, "attn_raw"),
        lambda d: Add(d, "resid_post", 0.1),
        lambda d: ProjectOut(d, "attn_out"),
        lambda d: ProjectOut(d, "head_out", heads=((0, 1),), phase="generated"),
    ],
)
def test_what_has_no_patch_form_is_refused_by_name(intervention: Any) -> None:
    made = intervention(Direction(torch.ones(1, HIDDEN), (0,), "resid_mid"))
    with pytest.raises(SteerError, match=f"{type(made).__name__} at {made.site}") as caught:
        Patch.from_steering(Steering((made,)))
    assert "hook" in caught.value.remedy


def test_text_says_what_it_is() -> None:
    assert "2 matrices, 3 heads" in str(patch())
