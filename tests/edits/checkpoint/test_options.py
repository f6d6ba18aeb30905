"""What a user can ask of `apply` beside the patch: hashes, a forced base, several patches, and what the card says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from edits.checkpoint import Manifest, pin, plan, revert
from steer.errors import SteerError
from steer.operations import AddDense, AddLowRank, Matrix, ProjectColumns, Scale
from steer.patches import Patch
from tests.edits.material import HIDDEN, contents, matrix, patch

Folder = Callable[..., Path]


@pytest.mark.parametrize("link", [False, True])
def test_every_file_is_hashed_on_request(tiny_folder: Folder, tmp_path: Path, link: bool) -> None:
    base = tiny_folder("llama", dtype=torch.bfloat16, max_shard_size="60KB")
    plain = plan(patch(), base).apply(tmp_path / "plain")
    done = plan(patch(), base).apply(tmp_path / "out", hash_all=True, link=link)
    found = contents(done.path)
    assert {name: data for name, data in contents(plain.path).items() if "manifest" not in name} == {
        name: data for name, data in found.items() if "manifest" not in name
    }
    ours = {name for name in found if name.startswith("steer/")}
    assert {file.name: file.sha256 for file in done.manifest.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name not in ours
    }
    assert all(file.sha256 is None for file in plain.manifest.files)


def test_another_base_is_refused_or_forced_and_then_named(tiny_folder: Folder, tmp_path: Path) -> None:
    base, other = tiny_folder("llama"), tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"][3, 5] += 1
    weights["model.norm.weight"] += 1  # Not touched by the patch, so nobody's business.
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    pinned = pin(plan(patch(), base))
    with pytest.raises(SteerError, match="force-base"):
        plan(pinned, other).apply(tmp_path / "out")
    done = plan(pinned, other, force_base=True).apply(tmp_path / "out")
    assert [each.matrix for each in done.manifest.forced] == ["layer 2, attention_output"]
    assert done.manifest.forced[0].expected == pinned.expects[matrix(2)] != done.manifest.forced[0].found
    assert "1 matrices were not what" in done.summary() and "1 matrices differ" in (done.path / "README.md").read_text()
    assert not plan(pinned, base, force_base=True).apply(tmp_path / "same").manifest.forced
    assert contents(revert(done)) == contents(other)


def test_several_patches_are_composed_and_their_conflicts_told(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama", dtype=torch.float32)
    patches = [patch(seed=1), patch(seed=2, weight=0.5), Patch((Scale(Matrix(3, "mlp_output"), 0.5),))]
    made = plan(patches, base)
    assert made.conflicts.order_matters and "the order matters on 2" in str(made)
    done = made.apply(tmp_path / "out")
    whole = Patch.compose(*patches).plan(base).apply(tmp_path / "whole")
    assert contents(done.path) == contents(Path(whole))


def test_the_card_of_the_base_is_kept_with_the_recipe_behind_it(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16), base)
    for number, text in enumerate(("---\nlicense: mit\n---\n# Model\nText \u00e9", "x\n\n", "x\n")):
        (base / "README.md").write_text(text)
        done = plan(patch(), base).apply(tmp_path / str(number))
        card = (done.path / "README.md").read_text()
        assert card.startswith(text) and "\n\n## Edited weights\n" in card and "\n\n\n" not in card
        assert done.manifest.patch in card and "steer revert" in card
        for each in done.manifest.edited:
            assert each.name in card and str(each.before)[7:23] in card and each.after[7:23] in card
        assert contents(revert(done, tmp_path / f"{number}-back")) == contents(base)
        twice = plan(patch(seed=3), done.path).apply(tmp_path / f"{number}-twice", keep_undo=True)
        assert (twice.path / "README.md").read_text().startswith(card)
        assert contents(revert(twice, tmp_path / f"{number}-once")) == contents(done.path)
    (base / "README.md").unlink()
    done = plan(patch(), base).apply(tmp_path / "none")
    card = (done.path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers"}, "a folder's name is no model of the hub"
    assert contents(revert(done, tmp_path / "none-back")) == contents(base)


def test_a_change_that_drowns_in_rounding_is_said(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama", dtype=torch.bfloat16)
    tiny = AddDense(matrix(1), torch.full((HIDDEN, HIDDEN), 1e-6))
    done = plan(Patch((tiny, *patch(((0, (1,)),)).operations)), base).apply(tmp_path / "out")
    assert "on 1 of 2 tensors more than half of it was lost" in done.summary() and "--dtype float32" in done.summary()
    assert "--dtype float32" in (done.path / "README.md").read_text()
    wide = plan(Patch((tiny,)), base, dtype="float32").apply(tmp_path / "wide")
    assert "lost" not in wide.summary()


class Halves:
    """A difference that is made when it is read, as one of two checkpoints is, and says how much was asked for at once."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.largest = shape, 0

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        piece = torch.full((rows.stop - rows.start, columns.stop - columns.start), 0.5, dtype=torch.float64)
        self.largest = max(self.largest, piece.numel())
        return piece

    def digest(self) -> str:
        return "halves"


def test_differences_are_read_in_pieces_and_described_instead_of_stored(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    source = Halves((before.shape[0], before.shape[1]))
    made = plan(Patch((AddDense(Matrix(-1, name), source),)), base)
    assert (
        "1 dense differences" in str(made)
        and f"1/{len(load_file(base / 'model.safetensors'))} tensors by name" in made.coverage
    )
    done = made.apply(tmp_path / "out", keep_undo=True)
    assert torch.equal(load_file(done.path / "model.safetensors")[name], (before.double() + 0.5).bfloat16())
    assert not (done.path / "steer" / "patch.safetensors").exists()
    story = json.loads((done.path / "steer" / "patch.json").read_text())
    assert story["fingerprint"] == done.manifest.patch and story["operations"][0]["digest"] == "halves"
    assert contents(revert(done)) == contents(base)


def test_a_family_without_a_record_can_be_patched_by_names(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "brandnew"}))
    name = "model.layers.0.mlp.up_proj.weight"
    done = plan(Patch((Scale(Matrix(-1, name), 0.0),)), base).apply(tmp_path / "out")
    assert not load_file(done.path / "model.safetensors")[name].any() and done.manifest.shape_id == ""
    with pytest.raises(SteerError, match="brandnew"):
        plan(patch(), base)
    with pytest.raises(SteerError, match="no tensor nobody"):
        plan(Patch((Scale(Matrix(-1, "nobody.weight"), 0.0),)), base)


# Quantised checkpoints.


def quantise(base: Path, out: Path, kind: str) -> Path:
    """Give layer 1's attention output the tensors that a format has; the numbers are made up."""
    shutil.copytree(base, out)
    weights = load_file(out / "model.safetensors")
    stem = "model.layers.1.self_attn.o_proj"
    weight = weights.pop(f"{stem}.weight")
    rows, columns = weight.shape
    more = {
        "fp8": {f"{stem}.weight": weight.to(torch.float8_e4m3fn), f"{stem}.weight_scale_inv": torch.ones(1, 1)},
        "gptq": {
            f"{stem}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{stem}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
            f"{stem}.scales": torch.ones(1, rows).half(),
            f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32),
        },
        "awq": {
            f"{stem}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
            f"{stem}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
            f"{stem}.scales": torch.ones(1, rows).half(),
        },
        "bitsandbytes": {
            f"{stem}.weight": torch.zeros(rows * columns // 2, 1, dtype=torch.uint8),
            f"{stem}.weight.absmax": torch.zeros(rows * columns // 64),
            f"{stem}.weight.quant_map": torch.zeros(16),
            f"{stem}.weight.quant_state.bitsandbytes__nf4": torch.zeros(10, dtype=torch.uint8),
        },
        "compressed-tensors": {
            f"{stem}.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
            f"{stem}.weight_scale": torch.ones(rows, 1).bfloat16(),
            f"{stem}.weight_shape": torch.tensor([rows, columns]),
        },
    }[kind]
    save_file(weights | more, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": kind}}))
    return out


@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_packed_targets_are_refused_by_name_and_everything_else_is_patched(
    tiny_folder: Folder, tmp_path: Path, kind: str
) -> None:
    base = quantise(tiny_folder("llama", dtype=torch.bfloat16), tmp_path / "base", kind)
    for operation, remedy in (
        (ProjectColumns(1, "attention_output", (0,), torch.ones(HIDDEN)), "--as lora"),
        (AddLowRank(matrix(1), torch.ones(1, HIDDEN), torch.ones(HIDDEN, 1)), "--as lora"),
        (Scale(matrix(1), 0.5), "hook form"),
        (Scale(Matrix(-1, "model.layers.1.self_attn.o_proj.weight"), 0.5), "hook form"),
    ):
        with pytest.raises(SteerError, match=f"quantised on disk .{kind}") as caught:
            plan(Patch((operation,)), base)
        assert remedy in str(caught.value)
    with pytest.raises(SteerError, match="--dtype"):
        plan(patch(((0, (1,)),)), base, dtype="float32")
    done = plan(patch(((0, (1,)), (2, (0,)))), base).apply(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, done.path))
    changed = {name for name in before if before[name].view(torch.uint8).ne(after[name].view(torch.uint8)).any()}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 2)}
    assert contents(revert(done)) == contents(base)


def test_experts_in_mxfp4_are_refused_and_the_attention_is_patched(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("gpt_oss", dtype=torch.bfloat16), base)
    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        experts, inputs, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.zeros(experts, out, max(1, inputs // 32), 16, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.zeros(experts, out, max(1, inputs // 32), dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    down = Matrix(1, "expert_down", 0)
    for operations in (
        (ProjectColumns(1, "expert_down", None, torch.ones(HIDDEN), expert=0),),
        (Scale(down, 0.5), AddLowRank(down, torch.ones(1, 64), torch.ones(HIDDEN, 1))),
    ):
        with pytest.raises(SteerError, match="quantised on disk"):
            plan(Patch(operations), base)
    done = plan(Patch((Scale(matrix(1), 0.5),)), base).apply(tmp_path / "out")
    assert Manifest.read(done.path).edited[0].name == "model.layers.1.self_attn.o_proj.weight"
