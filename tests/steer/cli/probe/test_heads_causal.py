"""`steer probe heads --causal` and lists of heads, as typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steer.cli import app
from steer.head_lists import parse_heads
from tests.probes import made
from tests.steer.cli.probe.conftest import Call


def test_the_best_heads_are_patched_and_printed_as_a_list(
    steer: Call, tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = tiny_folder("qwen3"), tmp_path / "run"
    made.traces(12).save(run)
    steer("collect", model, "--traces", run, "--out", tmp_path / "s")
    steer(
        "probe", "length", model, "--from", tmp_path / "s", "--percentiles", 40, 60, "--out", tmp_path / "d.safetensors"
    )
    words = ("probe", "heads", model, "--direction", tmp_path / "d.safetensors", "--permutations", 0, "--top", 3)
    found = steer(*words, "--from", run, "--causal", 2, "--out", tmp_path / "a.safetensors")
    assert [row["set"] for row in found["causal"]["sets"]][:2] == ["chosen", "all heads"]
    assert found["causal"]["sets"][0]["heads"] == 2
    heads = parse_heads(found["list"])
    assert heads == tuple((row["layer"], row["head"]) for row in found["heads"])
    again = steer(*words, "--from", tmp_path / "s", "--traces", run, "--causal", 2, "--out", tmp_path / "b.safetensors")
    assert again["causal"] == found["causal"]
    told = steer(*words, "--from", tmp_path / "s", "--causal", 2, "--out", tmp_path / "c.safetensors", status=2)
    assert "--traces" in str(told)
    (tmp_path / "list.txt").write_text(found["list"])
    patch = steer("patch", "thinkedit", model, "--direction", tmp_path / "d.safetensors", "--head", tmp_path / "list.txt", "--out", tmp_path / "p.safetensors")  # fmt: skip
    assert [tuple(head) for head in patch["heads"]] == list(heads)
    capsys.readouterr()
    assert (
        app.run([str(word) for word in (*words, "--from", run, "--causal", 1, "--out", tmp_path / "e.safetensors")])
        == 0
    )
    assert "activation patching on" in capsys.readouterr().out
