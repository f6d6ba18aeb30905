"""What vLLM reads is what hooks read: means within 1e-4, choices of experts equal, in chunks, with a warm prefix cache."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import steer
from probes.collect.run import collect
from probes.collect.summary import Summary
from steer.sampling import Sampling
from tests.vllm import cases, reading
from tests.vllm.lab import ENVIRONMENT, LONGEST, PYTHON, ROOT

pytestmark = pytest.mark.vllm
CLOSE = 1e-4


def read(bench: Any, name: str, **options: Any) -> tuple[Any, Any, Path]:
    """Return the model, its run, and the folder in which an engine has left what it read of it."""
    made = bench(name)
    model = steer.load(str(made.model))
    place = made.folder / "read" / "-".join([name, *map(str, options)])
    with FileLock(f"{made.folder / name}.read.lock"):
        if not place.is_dir():
            place.mkdir(parents=True)
            run = model.generate(list(cases.QUESTIONS), sampling=Sampling(max_new_tokens=60), samples=2)
            run.save(place / "run")
            reading.steering(model).save(place / "s.yaml")
            engine = {
                "max_num_batched_tokens": 32,
                "max_num_seqs": 8,
                "max_model_len": 256,
                "block_size": 32,
                **options,
            }
            job = {
                "model": str(made.model),
                "run": str(place / "run"),
                "steering": str(place / "s.yaml"),
                "options": engine,
            }
            (place / "job.json").write_text(json.dumps(job))
            start(place)
    return model, steer.Traces.load(place / "run"), place


def start(place: Path) -> None:
    """Run the engine; whoever finds no summary reads what it said."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTHON", "STEER_"))}
    own = {
        "VLLM_CACHE_ROOT": str(
            place.parents[1] / "engines" / "cache"
        ),  # Where every engine of the lane looks a class up.
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "PYTHONPATH": str(ROOT),
    }
    command = [str(PYTHON), str(ROOT / "tests" / "vllm" / "collecting.py"), str(place / "job.json")]
    with (place / "log.txt").open("w") as said:
        done = subprocess.run(command, cwd=place, env={**inherited, **ENVIRONMENT, **own}, stdout=said, stderr=said, timeout=LONGEST, check=False)  # fmt: skip
    assert done.returncode == 0, (place / "log.txt").read_text(errors="replace")[-6000:]


def alike(found: Summary, wanted: Summary) -> None:
    """The same rows and quantities; sums of choices equal, everything else within 1e-4."""
    assert found.meta == wanted.meta
    assert found.rows == wanted.rows
    for name in wanted.quantities:
        mine, theirs = found.values(name), wanted.values(name)
        assert float(theirs.abs().max()) > 0, name
        if name.startswith("router.count"):
            assert torch.equal(mine, theirs), name
        assert float((mine - theirs).abs().max()) <= CLOSE, name


def test_summaries_are_those_of_hooks(bench: Any) -> None:
    """Compiled: what runs eagerly is the same code."""
    model, run, place = read(bench, "chain-moe", enforce_eager=False)
    assert int((place / "cached").read_text()) > 0, "else the prefix cache was not warm"
    assert max(len(trace.tokens) for trace in run) > 64, "else nothing came in chunks"
    steered = model.with_(steer.Steering.load(place / "s.yaml"), coefficient=reading.STRENGTH)
    recorders = reading.recorders(model)
    plain, changed = (collect(each, run, recorders=recorders) for each in (model, steered))
    for name in plain.quantities:
        moved = (plain.values(name) - changed.values(name)).abs().max()
        assert float(moved) > 100 * CLOSE or name.startswith(("resid_pre", "router")), f"{name} is hardly steered"
    alike(Summary.load(place / "plain"), plain)
    alike(Summary.load(place / "steered"), changed)
    rows = load_file(place / "rows.safetensors")
    for number, trace in enumerate(run[:2]):
        with model.capture(dict.fromkeys(reading.SITES)) as acts:
            model.run([trace.tokens])
        for site in reading.SITES:
            for layer in range(model.anatomy.layers):
                assert float((rows[f"{number}/{site}/{layer}"] - acts[site][layer][0]).abs().max()) <= CLOSE, (
                    site,
                    layer,
                )
