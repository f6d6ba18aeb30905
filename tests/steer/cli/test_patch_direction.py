"""`patch direction` as typed: a steering becomes a patch that agrees with it, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import steer
from steer.cli.app import run
from steer.directions import Direction
from steer.interventions import Add, Intervention, ProjectOut
from steer.patches import Patch
from steer.steering import Steering

Folder = Callable[..., Path]
IDS = [[5, 9, 14, 22]]


def v() -> Direction:
    return Direction(torch.randn(4, 48, generator=torch.Generator().manual_seed(0)), (0, 1, 2, 3), "resid_mid")


def saved(folder: Path, *interventions: Intervention) -> Path:
    return Steering(interventions).save(folder / "s.yaml")


def test_a_steering_becomes_a_patch_that_says_what_it_was_made_for(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder("llama")
    path = saved(tmp_path, Add(v(), "attn_out", 0.4), ProjectOut(v(), "mlp_out"))
    out = tmp_path / "p.safetensors"
    assert run(["patch", "direction", str(path), "--model", str(base), "--out", str(out), "--json"]) == 0
    told, patch = json.loads(capsys.readouterr().out), Patch.load(out)
    assert told["fingerprint"] == patch.fingerprint and told["steering"] == Steering.load(path).fingerprint
    assert set(patch.expects) == set(patch.matrices), "the patch knows the tensors that it was made for"
    assert {row["operation"] for row in told["operations"]} == {"add_bias", "project_out"}
    model = steer.load(base, self_check=False)
    hook, baked = (model.with_(change).run(IDS)[0] for change in (Steering.load(path), patch))
    assert float((hook - baked).abs().max()) < 1e-5 < float((hook - model.run(IDS)[0]).abs().max())


def test_what_has_no_such_form_is_refused(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = saved(tmp_path, Add(v(), "mlp_out", 0.4)), tmp_path / "p.safetensors"
    words = ["patch", "direction", str(path), "--model", str(tiny_folder("qwen3")), "--out", str(out)]
    assert run(words) == 2
    refusal = capsys.readouterr().err
    assert "Add at mlp_out" in refusal and "qwen3 models load no bias" in refusal and "hook form" in refusal
    assert not out.exists()


def test_a_tied_embedding_is_edited_where_the_head_will_be_its_own(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = saved(tmp_path, ProjectOut(v(), "resid_pre", layers=(0,))), tmp_path / "p.safetensors"
    words = ["patch", "direction", str(path), "--model", str(tiny_folder("qwen2")), "--out", str(out)]
    assert run(words) == 2 and "--untie" in capsys.readouterr().err
    assert run([*words, "--untie"]) == 0 and "--untie" in capsys.readouterr().out
    assert [str(matrix) for matrix in Patch.load(out).matrices] == ["embedding"]
