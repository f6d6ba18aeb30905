"""`steer probe experts --choose`, as typed, on a random mixture: nothing is gained, and the verb says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.tasks import registry
from probes.choose import parts
from probes.collect.plan import traces_hash
from steer.cli import app
from steer.expert_interventions import ScaleExperts
from steer.expert_scores import ExpertScores
from steer.steering import Steering
from steer.traces import Traces
from tests.experiments.test_expert_sweep import Words
from tests.steer.cli.probe.conftest import Call

Folder = Callable[..., Path]
SMALL = ("--betas", "4,64", "--counts", "1-2", "--controls", 1, "--seeds", 2, "--resamples", 0, "--no-null")


@pytest.fixture(scope="module", autouse=True)
def words() -> None:
    if "words" not in registry.names():
        registry.register("words", lambda argument, instruction: Words(argument or "wait"))


@pytest.fixture(scope="module")
def model(tiny_folder: Folder) -> Path:
    return tiny_folder("qwen3_moe")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("choosing") / "run"
    words = ["evaluate", str(model), "--task", "words", "--limit", "24", "--temperature", "3", "--max-new-tokens", "20"]  # fmt: skip
    assert app.run([*words, "--out", str(out), "--quiet", "--json"]) == 0
    return out


def test_number_and_beta_are_chosen_and_told_on_other_questions(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:  # fmt: skip
    out, steering, picture = tmp_path / "s.safetensors", tmp_path / "up.yaml", tmp_path / "sweep.png"
    found = steer(
        "probe", "experts", model, "--from", run, "--out", out, "--marker", ";", "--choose", *SMALL, "--aim", "longer",
        "--floor", 0, "--prompt", "let me think", "--policy", "min:5", "--switch", "so", "--steering", steering, "--sweep", picture,
    )  # fmt: skip
    scores, traces = ExpertScores.load(out), Traces.load(run)
    fit = parts([trace.item for trace in traces], seed=0)[0]
    assert scores.provenance["data_hash"] == traces_hash(traces.where(lambda trace: trace.item in fit))
    sweep = found["sweep"]
    assert [len(row["experts"]) for row in sweep["tried"]] == [0, 1, 1, 2, 2]
    assert [row["model"] for row in sweep["report"]][-2:] == ["prompt", "decoding"]
    assert not any("not known" in sentence for sentence in sweep["sentences"])
    chosen = sweep["chosen"]
    assert chosen is not None
    (scaling,) = Steering.load(steering).interventions
    assert scaling == ScaleExperts(tuple(map(tuple, chosen["experts"])), chosen["beta"])
    assert set(scaling.experts) <= set(scores.top(2))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_people_get_tables_and_a_dead_end_is_told(model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    traces = Traces.load(run)
    never = Traces([replace(trace, gold="never", correct=False) for trace in traces], traces.meta).save(
        tmp_path / "run"
    )
    words = ["probe", "experts", str(model), "--from", str(never), "--marker", ";", "--choose"]
    options = ["--policy", "none", "--steering", str(tmp_path / "up.yaml")]
    assert app.run([*words, *options, *map(str, SMALL), "--out", str(tmp_path / "s.safetensors")]) == 0
    told = capsys.readouterr()
    for word in ("Tried on 6 questions", "On 6 other questions, 2 seeds each", "random 1", "none is to be used", "No prompt"):  # fmt: skip
        assert word in told.out
    assert "was not written" in told.err and not (tmp_path / "up.yaml").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--betas", "2"), "--choose"),
        (("--steering", "x.yaml"), "--choose"),
        (("--aim", "shorter"), "--choose"),
        (("--policy", "min:3"), "--choose"),
        (("--choose", "--betas", "two"), "--betas"),
        (("--choose", "--betas", "1"), "not 1"),
        (("--choose", "--betas", "-2"), "0 or more"),
        (("--choose", "--counts", "0"), "--counts"),
        (("--choose", "--aim", "best"), "--aim best"),
        (("--choose", "--phase", "now"), "no phase"),
        (("--choose", "--steering", "up.json"), ".yaml"),
        (("--choose", "--counts", "5"), "at most 4"),
        (("--choose", "--policy", "max:3"), "no policy"),
    ],
)
def test_what_is_refused_and_nothing_is_written(steer: Call, model: Path, run: Path, tmp_path: Path, options: tuple[str, ...], word: str) -> None:  # fmt: skip
    subject = model if options[-1] in ("5", "max:3") else "no model"
    error = steer("probe", "experts", subject, "--from", run, "--marker", ";", "--out", tmp_path / "s.safetensors", *options, status=2)  # fmt: skip
    assert word in json.dumps(error)
    assert not (tmp_path / "s.safetensors").exists() and not list(tmp_path.glob("*.yaml"))


def test_a_summary_cannot_be_asked(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    steer("collect", model, "--traces", run, "--out", tmp_path / "sum", "--recorder", "router_counts:spans=all")
    error = steer("probe", "experts", model, "--from", tmp_path / "sum", "--out", tmp_path / "s.safetensors", "--choose", status=2)  # fmt: skip
    assert "cannot be asked" in error["message"]
