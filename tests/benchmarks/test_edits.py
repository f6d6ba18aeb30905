"""The benchmark of editing: all sides do the work they are named for, on files that are what they seem; nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import edits as program
from benchmarks import worker
from benchmarks.contestants import WORKS
from benchmarks.edits import CONTESTS, COSTS, Contest, ratios
from benchmarks.synthetic import SHARDS, SMALL, make, patch_for, size_of
from benchmarks.worker import Worker, command, memory
from tests.edits.material import contents


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make(root / str(seed), 0.01, SMALL, seed) for seed in range(3)]


def numbers(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_the_checkpoint_is_as_large_as_told_and_loads(folders):
    assert size_of(folders[0]) == pytest.approx(1e7, rel=0.1)
    assert len(list(folders[0].glob("*.safetensors"))) == SHARDS
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert model.dtype == torch.bfloat16
    assert {name for name, _ in model.named_parameters()} == set(numbers(folders[0]))


def test_other_seeds_are_near_models(folders):
    base, other = (torch.cat([each.flatten().double() for each in numbers(folder).values()]) for folder in folders[:2])
    assert 0.05 < float((other - base).norm() / base.norm()) < 0.2


def test_the_patch_touches_every_shard(folders, tmp_path):
    WORKS["apply"](folders[:1], tmp_path / "out")
    before, after = contents(folders[0]), contents(tmp_path / "out")
    index = json.loads(before["model.safetensors.index.json"])["weight_map"]
    with_heads = {file for name, file in index.items() if "o_proj" in name}
    assert len(with_heads) >= SHARDS - 1
    assert {name for name in before if before[name] != after[name]} - {"README.md"} == with_heads
    changed = {operation.layer for operation in patch_for(folders[0]).operations}
    now, then = numbers(tmp_path / "out"), numbers(folders[0])
    assert {name for name in then if not torch.equal(now[name], then[name])} == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in changed
    }


@pytest.mark.parametrize("work", ["copy", "copy, flushed behind", "load and save", "read and write"])
def test_references_write_what_they_read(folders, tmp_path, work):
    WORKS[work](folders, tmp_path / "out")
    found, expected = contents(tmp_path / "out"), contents(folders[0])
    if work == "load and save":
        assert all(torch.equal(value, numbers(folders[0])[name]) for name, value in numbers(tmp_path / "out").items())
    else:
        assert found == expected


def test_ours_and_the_plain_loop_merge_the_same(folders, tmp_path):
    """The loop adds in float32, so a few numbers differ by one rounding."""
    WORKS["merge"](folders, tmp_path / "ours")
    WORKS["loop"](folders, tmp_path / "loop")
    ours, theirs = numbers(tmp_path / "ours"), numbers(tmp_path / "loop")
    assert ours.keys() == theirs.keys()
    equal = sum(int((ours[name] == theirs[name]).sum()) for name in ours) / sum(
        value.numel() for value in ours.values()
    )
    assert equal > 0.999
    for name, value in ours.items():
        torch.testing.assert_close(value.float(), theirs[name].float(), rtol=2**-7, atol=1e-6)


def test_a_worker_answers_is_watched_and_says_why_it_ended(folders, tmp_path):
    asked = {"work": "load and save", "folders": [str(folders[0])], "out": str(tmp_path / "out")}
    with Worker(command("ours")) as running:
        assert running.ask(asked) > 0 and not (tmp_path / "out").exists()
        with pytest.raises(RuntimeError, match="no such work"):
            running.ask({**asked, "work": "no such work"})
    found = memory("loop", {**asked, "work": "loop", "folders": [str(folder) for folder in folders]})
    largest = max(path.stat().st_size for path in folders[0].iterdir())
    assert found["peak"] - found["at_rest"] >= 0.5 * largest


def test_ratios_pair_a_slow_contestant_with_its_own_rounds():
    contest = Contest("ours", "plain", ("slow",), ("slow",), 1, 1.25, 1.1)
    times = {
        "plain": {1: (1.0, 2.0), 2: (10.0, 20.0), 3: (1.0, 2.0)},
        "ours": {1: (2.0, 4.0), 2: (20.0, 40.0), 3: (2.0, 4.0)},
        "slow": {2: (30.0, 60.0)},
    }
    found = ratios(times, contest, COSTS["slope"])
    assert found["ours"]["median"] == 2.0 and found["slow"]["median"] == 3.0
    assert found["slow / ours"]["median"] == 1.5


def test_the_program_tells_both_rows_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "ORACLE", tmp_path / "absent")
    monkeypatch.setattr(program, "memory", lambda work, request: {"at_rest": 1, "peak": len(request["folders"])})
    program.main(["--tiny", "--rounds", "1", "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    for contest in CONTESTS:
        row = found[contest.name]
        assert row["slope"].keys() >= {contest.name, f"{contest.reference} again"}
        assert row["gigabytes"] == pytest.approx([0.01, 0.02], rel=0.1)
        assert all(side["peak"] >= side["at_rest"] > 0 for sides in row["memory"].values() for side in sides)
    assert "left out" in found["merge"]["mergekit"] and not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match="GB are needed"):
        program.main(["--patch", "0", "100000000", "--merge", "0", "0", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_files_are_removed_when_it_is_ended(tmp_path):
    asked = [sys.executable, "-m", "benchmarks.edits", "--tiny", "--rounds", "50", "--folder", str(tmp_path)]
    run = subprocess.Popen(
        asked, cwd=worker.ROOT, env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert run.stderr is not None and b"round" in run.stderr.readline()
    assert list(tmp_path.iterdir())
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 143
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())
