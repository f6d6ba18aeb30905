"""Plans: read from headers, counted against what exists, refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edits.checkpoint.plan import plan
from steer.errors import SteerError
from steer.identity import ModelIdentity
from steer.patches import Patch
from tests.edits.material import FAMILIES, contents, patch

Folder = Callable[..., Path]
NAME = "model.layers.2.self_attn.o_proj.weight"


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """Copy a single-file checkpoint with other tensors and other configuration."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_what_is_touched_against_what_exists(tiny_folder: Folder, family: str) -> None:
    base = tiny_folder(family)
    made = patch().plan(base)
    assert made.coverage == "attention output 2/4 layers, 3/16 heads"
    assert made.bytes_to_write == sum(len(data) for data in contents(base).values())
    assert [tensor.name for tensor in made.touched] == [NAME.replace("2", "0"), NAME]
    width = load_file(base / "model.safetensors")[NAME].shape[1] // 4
    assert {tensor.head_width for tensor in made.touched} == {width}
    assert made.bytes_edited == 2 * 48 * 4 * width * 4


def test_says_itself_in_text_and_html(tiny_folder: Folder) -> None:
    made: Any = patch().plan(tiny_folder("qwen3", dtype=torch.bfloat16))
    for text in (str(made), made._repr_html_()):
        for word in (
            "2/4 layers, 3/16 heads",
            NAME,
            "BF16",
            "48x64",
            "transformers",
            "vLLM",
            "layer 0, attention_output",
        ):
            assert word in text, word
    assert "<table>" in made._repr_html_()


def test_a_plan_writes_nothing_and_reads_headers_only(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("llama"), base)
    before = contents(base)
    path = base / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert patch().plan(base).coverage.startswith("attention output 2/4")
    path.write_bytes(data)
    assert contents(base) == before and [p.name for p in tmp_path.iterdir()] == ["base"]


def test_scale_zero_touches_no_head(tiny_folder: Folder) -> None:
    made = plan(patch().scaled(0), tiny_folder("llama"))
    assert made.coverage == "attention output 2/4 layers, 0/16 heads"


def quantised(kind: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        stem = NAME.removesuffix(".weight")
        if kind == "fp8":
            tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)
            tensors[f"{stem}.weight_scale_inv"] = torch.ones(1, 1)
        elif kind == "scale only":
            tensors[f"{stem}.weight_scale_inv"] = torch.ones(1, 1)
        elif kind == "fp8 without scale":
            tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)
        elif kind == "mxfp4":
            del tensors[NAME]
            tensors |= {
                f"{stem}_blocks": torch.zeros(4, dtype=torch.uint8),
                f"{stem}_scales": torch.zeros(4, dtype=torch.uint8),
            }
        elif kind in ("gptq", "awq"):
            for name in [name for name in tensors if name.endswith("o_proj.weight")]:
                del tensors[name]
                stem = name.removesuffix(".weight")
                tensors |= {
                    f"{stem}.{part}": torch.zeros(2, 2, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")
                }
        elif kind == "bitsandbytes":
            tensors[NAME] = torch.zeros(1536, 1, dtype=torch.uint8)
            tensors[f"{NAME}.absmax"] = torch.ones(48)
            tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.zeros(3, dtype=torch.uint8)

    return change


@pytest.mark.parametrize("kind", ["fp8", "scale only", "fp8 without scale", "mxfp4", "gptq", "awq", "bitsandbytes"])
def test_quantised_targets_are_refused_by_name_with_a_remedy(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    base = rewritten(tiny_folder("llama"), tmp_path / "base", quantised(kind))
    with pytest.raises(SteerError) as caught:
        patch().plan(base)
    assert "quantis" in str(caught.value) or "F8_E4M3" in str(caught.value)
    assert "unquantised" in caught.value.remedy, caught.value


def test_a_checkpoint_with_other_parts_quantised_can_be_patched(tiny_folder: Folder, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.2.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    base = rewritten(tiny_folder("llama"), tmp_path / "base", change)
    done = patch().plan(base).apply(tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(done.path / "model.safetensors")
    assert {
        name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    } == {NAME, NAME.replace("2", "0")}


def test_missing_tensors_and_odd_dtypes_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    gone = rewritten(tiny_folder("llama"), tmp_path / "gone", lambda tensors: tensors.pop(NAME))  # type: ignore[arg-type, return-value]
    with pytest.raises(SteerError, match=NAME):
        patch().plan(gone)
    integers = rewritten(
        tiny_folder("llama"), tmp_path / "int", lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int32)})
    )
    with pytest.raises(SteerError, match="I32"):
        patch().plan(integers)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda: patch(((4, (0,)),)), "layer 4"),
        (lambda: patch(((0, (4,)),)), "heads 0 to 3"),
        (lambda: patch(hidden=47), "rows"),
        (lambda: Patch(patch().operations, ModelIdentity("other", "llama", "f" * 64)), "made for other"),
    ],
)
def test_a_patch_of_another_model_is_refused(tiny_folder: Folder, change: Callable[[], Patch], word: str) -> None:
    with pytest.raises(SteerError, match=word):
        change().plan(tiny_folder("llama"))


def test_folders_without_a_usable_checkpoint_are_refused(tmp_path: Path) -> None:
    for name in ("missing", "empty", "pickle"):
        folder = tmp_path / name
        if name != "missing":
            folder.mkdir()
            (folder / "config.json").write_text('{"model_type": "llama"}')
        if name == "pickle":
            torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(SteerError):
            patch().plan(folder)


def test_an_unknown_family_takes_the_users_record(tiny_folder: Folder, tmp_path: Path) -> None:
    base = rewritten(tiny_folder("llama"), tmp_path / "base", lambda tensors: None, model_type="novel")
    with pytest.raises(SteerError, match="novel"):
        patch().plan(base)
    from steer.anatomy.record import FAMILIES as RECORDS

    text = (RECORDS / "llama.yaml").read_text().replace("model_types: [llama]", "model_types: [novel]")
    (tmp_path / "record.yaml").write_text(text)
    assert patch().plan(base, tmp_path / "record.yaml").coverage.startswith("attention output 2/4")


def test_steer_does_not_import_edits_until_a_plan_is_made() -> None:
    code = "import steer.patches, sys; assert not any(name.split('.')[0] == 'edits' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
