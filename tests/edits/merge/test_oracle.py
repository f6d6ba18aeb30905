"""Against mergekit 0.1.5, run in an environment of its own: fp32 there, float64 here, one cast to bf16 on both sides."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import edits
from edits.merge.job import position
from edits.merge.methods.ties import find_edge
from edits.merge.recipe import PARAMETERS
from tests.edits.merge.material import family, loaded, recipe

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
FAMILIES = {
    "qwen3": {},
    "qwen3_moe": {"mlp_only_layers": []},
}  # fmt: skip
FILTERED = [{"filter": "self_attn", "value": [0.2, 0.9]}, {"value": 0.4}]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear-plain": ("linear", {"parameters": {"normalize": False}}),
    "linear-sharded": ("linear", {"base": "sharded"}),
    "task_arithmetic": ("task_arithmetic", {"parameters": {"lambda": 0.7}}),
    "task_arithmetic-normalized": ("task_arithmetic", {"parameters": {"normalize": True}}),
    "task_arithmetic-filtered": ("task_arithmetic", {"weight": FILTERED, "base": "sharded"}),
    "ties": ("ties", {}),
    "ties-sharded": ("ties", {"base": "sharded", "parameters": {"lambda": 1.1}}),
    "ties-plain": ("ties", {"parameters": {"normalize": False}}),
    "ties-rescaled": ("ties", {"parameters": {"rescale": True}}),
    "ties-gradient": ("ties", {"weight": [0.1, 0.5, 1.0], "density": [0.2, 0.9]}),
    "slerp": ("slerp", {}),
    "slerp-sharded": ("slerp", {"base": "sharded", "parameters": {"t": FILTERED}}),
    "dare_ties-whole": ("dare_ties", {"density": 1.0}),
    "dare_linear-whole": ("dare_linear", {"density": 1.0}),
}


def document(setting: str, models: dict[str, Path]) -> dict[str, Any]:
    method, changes = SETTINGS[setting]
    changes = dict(changes)
    own = {name: changes.pop(name) for name in ("weight", "density") if name in changes}
    found = recipe(method, models, **changes, dtype="float32", out_dtype="bfloat16")
    for entry in found["models"]:
        if own:
            entry["parameters"] = {**entry["parameters"], **own}
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], tuple[dict[str, Any], Path]]]:
    """Every recipe with what mergekit made of it, all in one process."""
    if not PYTHON.is_file():
        pytest.skip("there is no .venv-oracle with mergekit; `make oracle` makes it where the package can be had")
    root = tmp_path_factory.mktemp("mergekit")
    made, asked = {}, []
    for name, options in FAMILIES.items():
        models = family(root / name, name, **options)
        for setting in SETTINGS:
            path, out = root / f"{name}-{setting}.yaml", root / name / f"theirs-{setting}"
            path.write_text(yaml.safe_dump(document(setting, models)))
            asked.append((str(path), str(out)))
            made[name, setting] = (document(setting, models), out)
    (root / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("run_mergekit.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, script, root / "asked.json"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield made


def units(found: Tensor, expected: Tensor) -> np.ndarray:
    """Distance in units of the last place of bf16, counted along the numbers that bf16 has."""

    def ordered(tensor: Tensor) -> np.ndarray:
        bits = tensor.contiguous().view(torch.int16).numpy().astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(ordered(found) - ordered(expected))


def at_edge(source: dict[str, Any], folders: list[dict[str, Tensor]], name: str) -> np.ndarray:
    """Entries whose magnitude, rounded to fp32 as mergekit compares it, is that of the last entry kept by a model."""
    base, *models = [folder[name].double() for folder in folders]
    found = np.zeros(base.shape, dtype=bool)
    for model, entry in zip(models, source["models"], strict=True):
        density = PARAMETERS["ties"]["density"].read(entry["parameters"]["density"], "").at(name, position(name, 4))
        delta = model - base
        edge = find_edge(lambda delta=delta: iter([delta.reshape(-1)]), delta.numel(), float(density)).magnitude
        found |= np.isclose(delta.abs().numpy(), edge, rtol=3e-7, atol=0)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_mergekits(
    name: str,
    setting: str,
    theirs: dict[tuple[str, str], tuple[dict[str, Any], Path]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    source, out = theirs[name, setting]
    ours, expected = loaded(edits.merge(source, tmp_path / "ours").path), loaded(out)
    assert ours.keys() == expected.keys()
    folders = [loaded(Path(source["base_model"])), *(loaded(Path(entry["model"])) for entry in source["models"])]
    numbers = excluded = cancelled = differing = 0
    for tensor, value in ours.items():
        assert value.dtype == expected[tensor].dtype == torch.bfloat16
        distance = units(value, expected[tensor])
        if source["merge_method"] == "ties":
            ties = at_edge(source, folders, tensor)
            excluded += int((ties & (distance > 1)).sum())
            distance = np.where(ties, 0, distance)
        # Where terms cancel, fp32 itself is further off than one unit of so small a result.
        largest = np.max([np.abs(folder[tensor].double().numpy()) for folder in folders], axis=0)
        close = np.abs((value.double() - expected[tensor].double()).numpy()) <= 4 * 2.0**-24 * largest
        cancelled += int((close & (distance > 1)).sum())
        distance = np.where(close, np.minimum(distance, 1), distance)
        assert distance.max(initial=0) <= 1, f"{tensor}: {(distance > 1).sum()} of {distance.size}"
        numbers, differing = numbers + distance.size, differing + int((distance == 1).sum())
    counts = {"numbers": numbers, "one unit apart": differing, "ties of magnitude": excluded, "cancelled": cancelled}
    record_property(f"{name} {setting}", counts)
    assert excluded < numbers / 50 and cancelled < numbers / 10_000
