"""Patches in vLLM: a checkpoint with ThinkEdit and scaled experts, and ThinkEdit as an adapter, against the hook form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steer import Direction, Patch, ProjectOut, ScaleExperts, Steering
from steer.sources import locate
from steer.targets import target_of
from tests.vllm.test_face import started

pytestmark = pytest.mark.vllm
CLOSE = 1e-5


def thinkedit(model: str) -> Steering:
    """ThinkEdit's form."""
    vectors = torch.randn(2, target_of(model).anatomy.hidden, generator=torch.Generator().manual_seed(0))
    heads = ProjectOut(Direction(vectors, (1, 2), "resid_mid"), "head_out", heads=((1, 0), (1, 1), (2, 3)))
    return Steering((heads,))


def agrees(folder: Path, served: str, hooks: str) -> None:
    told = json.loads(started(folder, "-m", "steer.cli", "verify", served, hooks, "--tokens", "20", "--json"))
    assert told["passed"] and told["tokens"] >= 100, told
    assert told["greedy"]["same"] == told["replies"] == 8
    assert told["largest"] <= CLOSE


def test_a_checkpoint_with_both_matches_the_hook_form(tmp_path: Path) -> None:
    """The patch is written in float32: a checkpoint of bf16 rounds the change."""
    model = "organism:chain-moe"
    base, edit = str(locate(model).folder), thinkedit(model)
    experts = Steering((ScaleExperts(tuple((layer, 1) for layer in target_of(model).anatomy.expert_layers), 4.0),))
    patch = Patch.compose(Patch.from_steering(edit), Patch.from_steering(experts, base))
    patch.plan(base, dtype="float32").apply(tmp_path / "edited")
    hooks = f"{model}+{edit.save(tmp_path / 'heads.yaml')}+{experts.save(tmp_path / 'experts.yaml')}"
    agrees(tmp_path, f"vllm:{tmp_path / 'edited'}", hooks)


def test_an_adapter_matches_the_hook_form(tmp_path: Path) -> None:
    hooks = f"organism:chain+{thinkedit('organism:chain').save(tmp_path / 'heads.yaml')}"
    agrees(tmp_path, f"vllm:{hooks}", hooks)
