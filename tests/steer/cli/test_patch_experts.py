"""`patch experts` as typed: a patch, a steering or both, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import steer
from steer.cli.app import run
from steer.expert_scores import ExpertScores
from steer.interventions import ScaleExperts
from steer.patches import Patch
from steer.steering import Steering
from steer.targets import target_of
from tests.steer import test_expert_scores

Folder = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
IDS = [[5, 9, 14, 22]]
NAMED = ["--expert", "3:0", "--expert", "1:2"]


def scores(folder: Path, base: Path) -> Path:
    model = target_of(base).identity
    values = torch.tensor([[0.1, 0.2, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.3, 0.1, 0.2], [0.8, 0.0, 0.2, 0.2]])
    counts = {"chosen": torch.full((4, 4), 50), "together": torch.zeros(2, 4, 4, dtype=torch.int64)}
    made = test_expert_scores.made(**counts, values=values, layers=(0, 1, 2, 3), model=model)
    return made.save(folder / "scores.safetensors")


def typed(base: Path, *words: str) -> int:
    return run(["patch", "experts", str(base), *words])


def test_a_patch_and_a_steering_that_agree(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, out, up = tiny_folder("olmoe"), tmp_path / "p.safetensors", tmp_path / "up.yaml"
    assert typed(base, *NAMED, "--beta", "64", "--out", str(out), "--steering", str(up), "--json") == 0
    told, patch, steering = json.loads(capsys.readouterr().out), Patch.load(out), Steering.load(up)
    assert told["fingerprint"] == patch.fingerprint and told["steering_fingerprint"] == steering.fingerprint
    assert (told["experts"], told["beta"]) == ([[1, 2], [3, 0]], 64.0)
    assert told["coverage"] == "expert down 2/16 experts"
    assert told["hook"]["rows"][0]["note"] == "experts 2 of 4x4"
    assert set(patch.expects) == set(patch.matrices), "the patch knows the tensors that it was made for"
    assert steering.interventions == (ScaleExperts(((3, 0), (1, 2)), 64.0),)
    assert patch.model is not None and patch.model == steering.model
    model = steer.load(base, self_check=False)
    hook, baked = (model.with_(change).run(IDS)[0] for change in (steering, patch))
    assert float((hook - baked).abs().max()) < 1e-4 < float((hook - model.run(IDS)[0]).abs().max())


def test_the_steering_becomes_the_same_patch(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, up = tiny_folder("gpt_oss"), tmp_path / "up.yaml"
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    assert typed(base, *NAMED, "--beta", "0.5", "--out", str(one), "--steering", str(up)) == 0
    assert run(["patch", "direction", str(up), "--model", str(base), "--out", str(other)]) == 0
    assert Patch.load(one) == Patch.load(other)


def test_it_says_what_to_do_next(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, out, up = tiny_folder("olmoe"), tmp_path / "p.safetensors", tmp_path / "up.yaml"
    assert typed(base, *NAMED, "--beta", "2", "--out", str(out), "--steering", str(up)) == 0
    text = capsys.readouterr().out
    assert f"steer apply {base} {out}" in text and f"{base}+{up}" in text
    assert run(["apply", str(base), str(out), "--out", str(tmp_path / "edited")]) == 0
    assert run(["verify", f"{base}+{up}", str(tmp_path / "edited"), "--json"]) == 0


def test_other_weights_of_the_same_shape_are_told(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, twin, up = tiny_folder("olmoe"), tiny_folder("olmoe", seed=1), tmp_path / "up.yaml"
    assert typed(base, *NAMED, "--beta", "2", "--steering", str(up)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(["apply", str(base), str(up), "--out", str(tmp_path / "same")]) == 0
    with pytest.warns(UserWarning, match="other weights of the same shape"):
        assert run(["apply", str(twin), str(up), "--out", str(tmp_path / "other")]) == 0


def test_a_beta_of_one_in_a_file_is_told(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, up = tiny_folder("olmoe"), tmp_path / "up.yaml"
    assert typed(base, *NAMED, "--beta", "2", "--steering", str(up)) == 0
    up.write_text(up.read_text().replace("beta: 2.0", "beta: 1.0"))
    capsys.readouterr()
    assert run(["apply", str(base), str(up), "--out", str(tmp_path / "same")]) == 0
    assert "nothing was to change" in capsys.readouterr().out


def test_the_best_by_their_scores(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, out = tiny_folder("olmoe"), tmp_path / "p.safetensors"
    words = ["--scores", str(scores(tmp_path, base)), "--top", "2", "--beta", "64", "--out", str(out), "--json"]
    assert typed(base, *words) == 0
    told, patch = json.loads(capsys.readouterr().out), Patch.load(out)
    assert told["experts"] == [[0, 2], [3, 0]] and "ties" not in told
    assert ExpertScores.load(tmp_path / "scores.safetensors").fingerprint in patch.provenance["parents"]


def test_ties_of_the_last_one_are_told(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, up = tiny_folder("olmoe"), tmp_path / "up.yaml"
    given = ["--scores", str(scores(tmp_path, base)), "--top", "4", "--beta", "64"]
    assert typed(base, *given, "--steering", str(up), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ties"] == [[2, 3], [3, 2], [3, 3]] and told["experts"] == [[0, 1], [0, 2], [2, 1], [3, 0]]
    assert typed(base, *given, "--steering", str(tmp_path / "again.yaml")) == 0
    assert "3 other experts have the score of the last one" in capsys.readouterr().out


def test_what_weights_cannot_say_is_a_steering_alone(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base, out, up = tiny_folder("olmoe"), tmp_path / "p.safetensors", tmp_path / "up.yaml"
    extra = ["--renormalise", "--phase", "thinking"]
    for some in ([extra[0]], extra[1:], extra):
        assert typed(base, *NAMED, "--beta", "64", "--out", str(out), "--steering", str(up), *some) == 2
        told = capsys.readouterr().err
        assert "a patch was asked for with" in told.lower() and some[0] in told and "--steering FILE.yaml alone" in told
    assert not out.exists() and not up.exists()
    assert typed(base, *NAMED, "--beta", "64", "--steering", str(up), *extra) == 0
    assert Steering.load(up).interventions == (ScaleExperts(((1, 2), (3, 0)), 64.0, True, "thinking"),)


WRONG = [
    ("olmoe", [*NAMED, "--beta", "1"], "leaves every expert as it is"),
    ("olmoe", [*NAMED, "--beta", "-1"], "at least 0"),
    ("olmoe", ["--beta", "2"], "exactly one way to choose experts"),
    ("olmoe", [*NAMED, "--top", "2", "--beta", "2"], "exactly one way to choose experts"),
    ("olmoe", ["--top", "2", "--beta", "2"], "steer probe experts"),
    ("olmoe", ["--expert", "3:9", "--beta", "2"], "experts 0 to 3"),
    ("olmoe", ["--expert", "9:0", "--beta", "2"], "layers 0 to 3"),
    ("olmoe", ["--expert", "three", "--beta", "2"], "neither a list of experts nor a file"),
    ("qwen3_moe", ["--expert", "0:1", "--beta", "2"], "layers with experts: 1, 3"),
    ("llama", [*NAMED, "--beta", "2"], "dense"),
]


@pytest.mark.parametrize(("family", "words", "told"), WRONG)
def test_refusals(
    tiny_folder: Folder, tmp_path: Path, capsys: Captured, family: str, words: list[str], told: str
) -> None:
    for option, name in (("--out", "p.safetensors"), ("--steering", "s.yaml")):
        assert typed(tiny_folder(family), *words, option, str(tmp_path / name)) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_to_write_and_names_that_are_taken(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    base = tiny_folder("olmoe")
    assert typed(base, *NAMED, "--beta", "2") == 2
    assert "neither --out nor --steering" in capsys.readouterr().err.lower()
    (tmp_path / "s.yaml").write_text("taken")
    both = ["--out", str(tmp_path / "p.safetensors"), "--steering", str(tmp_path / "s.yaml")]
    assert typed(base, *NAMED, "--beta", "2", *both) == 2
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()
    assert typed(base, *NAMED, "--scores", "x.safetensors", "--beta", "2", *both[:2]) == 2


def test_scores_of_another_model(tiny_folder: Folder, tmp_path: Path, capsys: Captured) -> None:
    path = scores(tmp_path, tiny_folder("olmoe"))
    words = ["--scores", str(path), "--top", "2", "--beta", "2", "--steering", str(tmp_path / "s.yaml")]
    assert typed(tiny_folder("mixtral"), *words) == 2
    assert "The expert scores was made for" in capsys.readouterr().err
