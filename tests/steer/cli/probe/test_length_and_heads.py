"""`steer collect` and `steer probe length|heads`, from a run or a summary, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import probes
from steer.cli import app
from steer.cli.lists import numbers, words
from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import Add
from steer.scores import HeadScores
from steer.steering import Steering
from steer.subjects import open_subject
from tests.probes import made
from tests.steer.cli.probe.conftest import Call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made.traces(12).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("qwen3")


def test_collect_writes_what_it_says(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    told = steer("collect", model, "--traces", run, "--out", out, "--sites", "resid_mid,z", "--spans", "thinking", "--spans", "marker:;", "--layers", "0,2-3")  # fmt: skip
    summary = probes.Summary.load(out)
    assert told["layers"] == [0, 2, 3] == list(summary.layers)
    assert set(told["quantities"]) == {
        f"{site}/{span}" for site in ("resid_mid", "z") for span in ("thinking", "marker:;")
    }
    assert told["plan_bytes"] == sum(
        shard.tensor(name).nbytes for shard in summary.shards for name in summary.quantities
    )
    assert told["traces"]["unclosed"] > 0


def test_collect_says_the_bytes_before_it_starts(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        app.run(["collect", str(model), "--traces", str(run), "--out", str(tmp_path / "s"), "--max-tokens", "20"]) == 0
    )
    streams = capsys.readouterr()
    assert "MB will be kept" in streams.err
    assert "traces left out (longer than" in streams.err
    assert "thoughts not closed" in streams.err
    assert "resid_mid/predicts_thinking" in streams.out


def test_collect_refuses_a_folder_that_exists_and_resumes_one(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    arguments = ("collect", model, "--traces", run, "--out", tmp_path / "s")
    steer(*arguments)
    assert "exists already" in steer(*arguments, status=2)["message"]
    steer(*arguments, "--resume")
    assert "other options" in steer(*arguments, "--resume", "--layers", "1", status=2)["message"]


def test_a_run_and_its_summary_give_the_same_direction_and_scores(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    steer("collect", model, "--traces", run, "--out", tmp_path / "s")
    made_of = {}
    for kind, source in (("run", run), ("summary", tmp_path / "s")):
        direction, heads = tmp_path / f"d-{kind}.safetensors", tmp_path / f"h-{kind}.safetensors"
        told = steer("probe", "length", model, "--from", source, "--out", direction, "--below", "12", "--above", "18")
        scored = steer("probe", "heads", model, "--from", source, "--direction", direction, "--out", heads, "--top", "3", "--permutations", "20")  # fmt: skip
        made_of[kind] = (Direction.load(direction), HeadScores.load(heads), told, scored)
    assert torch.equal(made_of["run"][0].vectors, made_of["summary"][0].vectors)
    assert torch.equal(made_of["run"][1].values, made_of["summary"][1].values)
    direction, scores, told, scored = made_of["run"]
    assert [row["norm"] for row in told["layers"]] == pytest.approx(list(direction.norms.values()))
    assert told["counts"]["short"] > 0 < told["counts"]["long"]
    assert [(row["layer"], row["head"]) for row in scored["heads"]] == list(scores.top(3))
    assert {"score", "lower", "upper", "p_value"} <= set(scored["heads"][0])
    assert scored["stability"] == pytest.approx(scores.stability)


def test_thresholds_that_find_nothing_suggest_percentiles_which_then_work(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    arguments = ("probe", "length", model, "--from", run, "--out", tmp_path / "d.safetensors")
    error = steer(*arguments, status=2)
    assert "0 long" in error["message"]
    assert "--percentiles 20 80" in error["message"]
    assert not (tmp_path / "d.safetensors").exists()
    told = steer(*arguments, "--percentiles", "20", "80", "--by-group")
    assert told["rule"]["percentiles"] == [20, 80]
    assert set(told["edges"]) == {"0", "1", "2"}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_drawn_where_asked(steer: Call, model: Path, run: Path, tmp_path: Path, ending: str) -> None:
    direction = tmp_path / "d.safetensors"
    pictures = [tmp_path / f"{name}.{ending}" for name in ("length", "heads")]
    steer(
        "probe", "length", model, "--from", run, "--out", direction, "--percentiles", "20", "80", "--plot", pictures[0]
    )
    steer("probe", "heads", model, "--from", run, "--direction", direction, "--out", tmp_path / "h.safetensors", "--permutations", "5", "--plot", pictures[1])  # fmt: skip
    magic = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert all(picture.read_bytes().startswith(magic) for picture in pictures)


def test_people_get_tables(model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    direction = str(tmp_path / "d.safetensors")
    assert (
        app.run(["probe", "length", str(model), "--from", str(run), "--out", direction, "--percentiles", "20", "80"])
        == 0
    )
    assert "split-half cosine" in capsys.readouterr().out
    assert (
        app.run(
            [
                "probe",
                "heads",
                str(model),
                "--from",
                str(run),
                "--direction",
                direction,
                "--out",
                str(tmp_path / "h.safetensors"),
            ]
        )
        == 0
    )
    assert "rank correlation of two halves" in capsys.readouterr().out


def test_what_exists_is_not_written_over_and_nothing_runs_before(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    assert "exists already" in steer("probe", "length", model, "--from", run, "--out", taken, status=2)["message"]
    assert "exists already" in steer("probe", "length", "no model", "--from", run, "--out", taken, status=2)["message"]
    assert taken.read_bytes() == b"mine"


def test_another_models_summary_is_refused_by_headers(
    steer: Call, model: Path, run: Path, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    steer("collect", model, "--traces", run, "--out", tmp_path / "s")
    other = tiny_folder("llama")
    for arguments in (
        (
            "probe",
            "length",
            other,
            "--from",
            tmp_path / "s",
            "--out",
            tmp_path / "d.safetensors",
            "--percentiles",
            "20",
            "80",
        ),
    ):
        assert "was made for" in steer(*arguments, status=2)["message"]


def test_bad_input_is_one_paragraph_with_status_2(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    missing = steer("probe", "length", model, "--from", tmp_path / "nowhere", "--out", out, status=2)
    assert "nowhere" in missing["message"]
    assert (
        "no site"
        in steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--sites", "resid", status=2)["message"]
    )
    assert (
        "no span"
        in steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--spans", "thoughts", status=2)["message"]
    )
    assert (
        "trace or group"
        in steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--keep", "both", status=2)["message"]
    )
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    steer("probe", "heads", model, "--from", run, "--direction", tmp_path / "junk.safetensors", "--out", out, status=2)
    (tmp_path / "empty.jsonl").write_text("")
    assert (
        "no traces"
        in steer("collect", model, "--traces", tmp_path / "empty.jsonl", "--out", tmp_path / "s", status=2)["message"]
    )
    assert not out.exists()
    assert not (tmp_path / "s").exists()


def test_lists_on_the_command_line() -> None:
    assert words(["a,b", "c"]) == ["a", "b", "c"]
    assert words(None) == []
    assert numbers(["0-2,7", "1"], "layers") == [0, 1, 2, 7]
    assert numbers(None, "layers") is None
    for wrong in ("x", "3-1", "-2", "1.5"):
        with pytest.raises(SteerError, match="layers"):
            numbers([wrong], "layers")


def test_length_writes_a_steering_that_runs_as_a_subject(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    out, steering = tmp_path / "d.safetensors", tmp_path / "longer.yaml"
    common = ("probe", "length", model, "--from", run, "--percentiles", 30, 70, "--out", out)
    steer(*common, "--steering", steering, "--add-at", "mlp_out", "--add-layers", "1-2")
    made_of = Steering.load(steering)
    (add,) = made_of.interventions
    assert isinstance(add, Add) and (add.site, add.layers, add.coefficient) == ("mlp_out", (1, 2), 1.0)
    assert torch.equal(add.direction[1], Direction.load(out)[1])
    plain, steered = (open_subject(f"{model}{change}").run([[5, 9, 12]])[0] for change in ("", f"+{steering}@0.5"))
    assert not torch.equal(plain, steered)


@pytest.mark.parametrize("name", ["d.yaml", "longer.json"])
def test_a_steering_that_would_hide_another_file_is_refused(
    steer: Call, model: Path, run: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "d.safetensors"
    error = steer("probe", "length", model, "--from", run, "--out", out, "--steering", tmp_path / name, status=2)
    assert ".yaml" in error["expected"] and not out.exists()
