"""`steer probe effects`: from a run or from a task, with controls, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.evaluate import evaluate
from steer import Add, Direction, Steering
from steer.cli import app
from steer.cli.probe.effects import slug
from steer.model import SteerableModel, load
from steer.sampling import Sampling
from steer.traces import Traces
from tests.probes import made as common
from tests.probes.effects import made
from tests.steer.cli.probe.conftest import Call

BRIEF = ("--limit", 4, "--max-new-tokens", 40)


@pytest.fixture
def steer(steer: Call) -> Call:
    """Run the verb, as `steer` of the folder runs any."""
    return partial(steer, "probe", "effects")


@pytest.fixture(scope="module")
def chain() -> SteerableModel:
    return load("organism:chain")


@pytest.fixture(scope="module")
def push(chain: SteerableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors = torch.randn(2, chain.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    steering = Steering((Add(Direction(vectors, (2, 3), "attn_out", chain.identity), "attn_out", 0.2),))
    return steering.save(tmp_path_factory.mktemp("steerings") / "push.yaml")


@pytest.fixture(scope="module")
def run(chain: SteerableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    evaluate(chain, "chain:fit", out=folder, limit=4, samples=2, seed=5, sampling=Sampling(0.8, max_new_tokens=40))
    return folder


def test_it_generates_grades_and_measures(steer: Call, push: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "e", tmp_path / "p.png"
    told = steer("organism:chain", "--steering", f"{push}@-2", "--task", "chain", *BRIEF, "--random", 1, "--out", out, "--plot", picture)  # fmt: skip
    assert [row["name"] for row in told["rows"]] == ["push@-2", "push@-2, random 1"]
    assert {row["coefficient"] for row in told["rows"]} == {-2.0}
    measured = {(each["on"], each["part"], each["quantity"]) for each in told["effects"]["push@-2"]["measures"]}
    assert {("plain traces", "thinking", "kl"), ("own traces", "answer", "entropy_bits"), ("replies", "reply", "accuracy"), ("plain traces", "answer", "p_gold")} <= measured  # fmt: skip
    assert {each["quantity"] for each in told["beyond_controls"]} >= {"kl", "accuracy", "loops"}
    assert told["effects"]["push@-2"]["touched"] > 0
    stored = json.loads((out / "effects.json").read_text("utf-8"))
    assert stored["rows"] == told["rows"] and stored["effects"]["push@-2"]["traces"]
    folders = {path.name for path in (out / "runs").iterdir()}
    assert folders == {"plain", "push@-2", "push@-2-random-1"}
    assert Traces.load(out / "runs" / "push@-2").meta["changes"][0]["coefficient"] == -2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p-push@-2.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_asked_again_as_it_was(steer: Call, push: Path, run: Path, tmp_path: Path) -> None:
    told = steer("organism:chain", "--steering", push, "--from", run, "--random", 0, "--out", tmp_path / "e")
    own = Traces.load(tmp_path / "e" / "runs" / "push")
    before = Traces.load(run)
    for name in ("seed", "samples", "sampling", "items", "task"):
        assert own.meta[name] == before.meta[name], name
    assert [trace.id for trace in own] == [trace.id for trace in before]
    assert not told["beyond_controls"] and told["effects"]["push"]["questions"] == 4
    assert (
        "exists already"
        in steer("organism:chain", "--steering", push, "--from", run, "--out", tmp_path / "e", status=2)["message"]
    )


def test_the_right_answers_of_the_run_as_a_list(steer: Call, push: Path, run: Path, tmp_path: Path) -> None:
    told = steer("organism:chain", "--steering", push, "--from", run, "--random", 0, "--forced-only", "--answers", "golds", "--out", tmp_path / "e")  # fmt: skip
    measures = {each["quantity"]: each for each in told["effects"]["push"]["measures"] if each["part"] == "answer"}
    assert measures["p_gold"]["plain"] < measures["p_gold_among"]["plain"] <= 1
    assert "Δ p_gold_among (answer)" in told["rows"][0]


def test_coefficient_zero_changes_nothing_at_all(steer: Call, push: Path, run: Path, tmp_path: Path) -> None:
    told = steer("organism:chain", "--steering", f"{push}@0", "--from", run, "--random", 0, "--out", tmp_path / "e")
    for each in told["effects"]["push@0"]["measures"]:
        assert each["difference"] in (0, None) and (each["quantity"] != "kl" or each["steered"] == 0), each


def test_resume_goes_on(steer: Call, push: Path, run: Path, tmp_path: Path) -> None:
    arguments = ("organism:chain", "--steering", push, "--from", run, "--random", 1, "--out", tmp_path / "e")
    first = steer(*arguments)
    (tmp_path / "e" / "effects.json").write_text("cut off")
    written = (tmp_path / "e" / "runs" / "push" / "journal").stat().st_mtime_ns
    assert "--resume" in steer(*arguments, status=2)["remedy"]
    again = steer(*arguments, "--resume")
    assert (
        again["rows"] == first["rows"] and (tmp_path / "e" / "runs" / "push" / "journal").stat().st_mtime_ns == written
    )


def test_given_replies_alone(steer: Call, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("qwen3")
    made.steering(load(folder)).save(tmp_path / "push.yaml")
    made.graded(common.traces(4)).save(tmp_path / "run")
    told = steer(folder, "--steering", tmp_path / "push.yaml", "--from", tmp_path / "run", "--forced-only", "--answers", "a,b", "--out", tmp_path / "e")  # fmt: skip
    measures = told["effects"]["push"]["measures"]
    assert {each["on"] for each in measures} == {"plain traces"}
    assert {"p_gold", "p_gold_among", "kl"} <= {each["quantity"] for each in measures}
    assert not (tmp_path / "e" / "runs").exists()


def test_people_get_a_table(push: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "organism:chain",
        "--steering",
        str(push),
        "--from",
        str(run),
        "--random",
        "1",
        "--out",
        str(tmp_path / "e"),
    ]
    assert app.run(["probe", "effects", *words]) == 0
    said = capsys.readouterr().out
    for part in ("push on organism:chain: 4 questions", "beyond them", "kl (thinking) [nats]", "accuracy [share]", "largest mean KL over the thinking"):  # fmt: skip
        assert part in said, part


def test_what_is_wrong_is_said_before_anything_is_written(
    steer: Call, push: Path, run: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out, other = tmp_path / "e", tiny_folder("qwen3")
    ungraded = tmp_path / "ungraded"
    common.traces(3).save(ungraded)
    made.steering(load(other)).save(tmp_path / "other.yaml")
    (tmp_path / "two.safetensors").write_bytes(b"junk")
    for arguments, words in (
        (("organism:chain", "--steering", push), "neither --from nor --task"),
        (("organism:chain", "--steering", push, "--task", "chain", "--forced-only"), "--from RUN"),
        (
            ("organism:chain", "--steering", push, "--from", run, "--task", "chain", "--forced-only"),
            "so nothing is asked",
        ),
        (("organism:chain", "--steering", push, "--from", run, "--limit", 2), "as the run was"),
        (("organism:chain", "--steering", push, "--from", run, "--task", "chain:test"), "the run asked"),
        (("organism:chain", "--steering", push, "--from", tmp_path / "none"), "none"),
        (("organism:chain", "--steering", tmp_path / "none.yaml", "--from", run), "none.yaml"),
        (("organism:chain", "--steering", tmp_path / "two.safetensors", "--from", run), "two.safetensors"),
        (("organism:chain", "--steering", push, "--steering", push, "--from", run), "are called"),
        (("organism:chain", "--steering", tmp_path / "other.yaml", "--from", run), "was made for"),
        (("organism:chain", "--steering", push, "--from", ungraded), "another tokenizer"),
        ((other, "--steering", tmp_path / "other.yaml", "--from", ungraded), "no grade"),
        ((f"organism:chain+{push}", "--steering", push, "--from", run), "under 0 changes"),
        (("organism:chain", "--steering", push, "--from", run, "--thought", "answer"), "before_answer"),
        (("organism:chain", "--steering", push, "--from", run, "--forced-only", "--answers", "x"), "lacks its gold"),
        (("organism:chain", "--steering", push, "--from", run, "--forced-only", "--max-tokens", 3), "longer than"),
    ):
        error = steer(*arguments, "--out", out, status=2)
        assert words.lower() in error["message"].lower(), (words, error["message"])
        assert not out.exists(), words


def test_traces_without_a_thought(steer: Call, push: Path, chain: SteerableModel, tmp_path: Path) -> None:
    evaluate(chain, "chain", out=tmp_path / "run", limit=2, thinking=False, sampling=Sampling(0.0, max_new_tokens=20))
    error = steer("organism:chain", "--steering", push, "--from", tmp_path / "run", "--random", 0, "--forced-only", "--out", tmp_path / "e", status=2)  # fmt: skip
    assert "none has a thought" in error["message"]


def test_names_of_folders() -> None:
    assert slug("push@-2, random 1") == "push@-2-random-1"
