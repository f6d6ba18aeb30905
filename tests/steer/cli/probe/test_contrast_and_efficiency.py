"""`steer probe contrast|efficiency`, what the verbs say of a direction's quality, and `--choose`, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from probes import Summary, contrast_direction, efficiency_direction
from steer.cli import app
from steer.directions import Direction
from steer.interventions import Add
from steer.steering import Steering
from steer.traces import Traces
from tests.probes import made
from tests.steer.cli.probe.conftest import Call


def graded(count: int = 16, samples: int = 3) -> Traces:
    """Random traces, two of three right, with what a run of `steer evaluate` says."""
    run = made.traces(count, samples=samples, longest=20)
    told = {"task": {"name": "chain"}, "sampling": {"temperature": 1.0, "max_new_tokens": 6}, "seed": 0, "batch_size": 8}  # fmt: skip
    return Traces([replace(trace, correct=n % 3 != 0, gold="7") for n, trace in enumerate(run)], {**run.meta, **told})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    graded().save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("qwen3")


def test_contrast_from_a_run_and_from_its_summary(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--sites", "resid_post", "--spans", "last_token", "--spans", "last_prompt_token")  # fmt: skip
    summary = Summary.load(tmp_path / "s")
    for kind, more in (("PCA-C", ("--scale", "unit")), ("logistic", ("--by-item", "--inverse-penalty", "0.5"))):  # fmt: skip
        told = {}
        for source in (run, tmp_path / "s") if kind == "PCA-C" else (tmp_path / "s",):
            out = tmp_path / f"{kind}-{source.name}.safetensors"
            told[source.name] = steer("probe", "contrast", model, "--from", source, "--out", out, "--kind", kind, *more)
            told[source.name]["made"] = Direction.load(out)
        one, other = told["s"], told.get("run", told["s"])
        assert one["fingerprint"] == other["fingerprint"] and one["layers"] == other["layers"]
        expected = contrast_direction(
            summary, kind=kind, by_item="--by-item" in more, scale="unit" if "unit" in more else "contrast", C=0.5 if kind == "logistic" else 1.0
        )  # fmt: skip
        assert torch.equal(one["made"].vectors, expected.vectors)
        assert one["labels"]["positive"] == "correct" and one["counts"]["positive"] > one["counts"]["negative"] / 2
        whole = one["held_out"]["whole"]
        assert set(whole["baselines"]) == {"length", "prompt"}
        assert 0 <= whole["chosen"]["low"] <= whole["chosen"]["value"] <= whole["chosen"]["high"] <= 1
        assert {"norm", "split_half_cosine", "cone_degrees", "auc", "auc_low", "auc_high"} <= set(one["layers"][0])


def test_efficiency_reads_pairs_and_writes_the_papers_steering(
    steer: Call, model: Path, run: Path, tmp_path: Path
) -> None:
    steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--sites", "resid_post", "--spans", "last_token")
    out, steering = tmp_path / "e.safetensors", tmp_path / "shorter.yaml"
    told = steer("probe", "efficiency", model, "--from", tmp_path / "s", "--out", out, "--read-at", "last", "--normalise", "unit", "--steering", steering, "--add-layers", "1-2")  # fmt: skip
    expected = efficiency_direction(Summary.load(tmp_path / "s"), read_at="last", normalise="unit")
    assert torch.equal(Direction.load(out).vectors, expected.vectors)
    assert told["counts"]["pairs"] > 5 and told["span"] == "last_token"
    (add,) = Steering.load(steering).interventions
    assert isinstance(add, Add) and (add.site, add.layers, add.phase) == ("resid_post", (1, 2), "generated")


def test_people_are_told_what_a_direction_is_worth(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["probe", "length", str(model), "--from", str(run), "--percentiles", "30", "70", "--out", str(tmp_path / "d.safetensors"), "--prefix", "4", "--plot", str(tmp_path / "d.png")]  # fmt: skip
    assert app.run(arguments) == 0
    said = capsys.readouterr()
    assert "split-half cosine" in said.out and "at equal prefix" in said.out
    assert "length alone 1.000" in said.out and "tokens read alone 0.500 [0.500, 0.500]" in said.out
    assert "prompt alone" in said.out and "layer chosen on other questions" in said.out
    assert "Of the traces" in said.err
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert app.run(["probe", "contrast", str(model), "--from", str(run), "--out", str(tmp_path / "w.safetensors"), "--kind", "whitened"]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "right and" in said.out and "whitened, towards positive" in said.out


def test_choose_cuts_the_questions_and_tells_what_it_chose(steer: Call, model: Path, run: Path, tmp_path: Path) -> None:
    out, steering = tmp_path / "d.safetensors", tmp_path / "chosen.yaml"
    arguments = ("probe", "contrast", model, "--from", run, "--span", "predicts_thinking", "--choose", "--coefficients=-4,4", "--candidates", 2, "--controls", 2)  # fmt: skip
    told = steer(*arguments, "--floor", 0, "--aim", "shorter", "--out", out, "--steering", steering)
    choice, report = told["choice"], told["report"]
    assert (choice["questions"], report["questions"]) == (4, 4)
    assert told["counts"]["positive"] + told["counts"]["negative"] <= 8 * 3  # Made from the fit questions alone.
    assert len(choice["tried"]) == 1 + 2 * 2 and choice["tried"][0]["steering"] == "unsteered"
    lengths = [row["length"] for row in choice["tried"]]
    chosen = next(row for row in choice["tried"] if row["length"] == min(lengths))
    assert chosen["coefficient"] == choice["coefficient"]
    (add,) = Steering.load(steering).interventions
    assert isinstance(add, Add) and (add.coefficient, list(add.layers or ())) == (choice["coefficient"], choice["layers"])  # fmt: skip
    assert list(report["models"]) == ["unsteered", "chosen", "random 1", "random 2"]
    assert set(report["beyond_controls"]) == {"accuracy", "length"}
    again = steer(*arguments, "--floor", 0, "--aim", "shorter", "--out", tmp_path / "again.safetensors")
    assert (again["choice"], again["report"]) == (choice, report)


def test_choose_says_when_nothing_is_better_than_nothing(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model never answers in the task's form, so every steering falls below the floor of the graded run."""
    steering = tmp_path / "chosen.yaml"
    arguments = ["probe", "length", str(model), "--from", str(run), "--percentiles", "30", "70", "--choose", "--add-layers", "1", "--coefficients", "0.5", "--out", str(tmp_path / "d.safetensors"), "--steering", str(steering)]  # fmt: skip
    assert app.run(arguments) == 0
    said = capsys.readouterr()
    assert "unsteered (thinking tokens, fewest, among 1 of 2 points" in said.out
    assert "was not written" in said.err and not steering.exists()


def test_bad_input_is_one_paragraph_with_status_2(
    steer: Call, model: Path, run: Path, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    out = tmp_path / "x.safetensors"
    contrast = ("probe", "contrast", model, "--out", out, "--from")
    ungraded, right, alone = (tmp_path / name for name in ("ungraded", "right", "alone"))
    made.traces(6).save(ungraded)
    traces = graded(6)
    Traces([replace(trace, correct=True) for trace in traces], traces.meta).save(right)
    single = traces.where(lambda trace: trace.sample == 0)
    Traces([replace(trace, correct=n % 2 == 0) for n, trace in enumerate(single)], traces.meta).save(alone)
    steered, foreign = tmp_path / "steered", tmp_path / "foreign"
    Traces(list(traces), {**traces.meta, "changes": [{"kind": "steering"}]}).save(steered)
    ungolden = tmp_path / "ungolden"
    Traces([replace(trace, gold=None) for trace in traces], traces.meta).save(ungolden)
    Traces(list(traces), {**traces.meta, "model": made.model("llama").identity.to_dict()}).save(foreign)
    steer("collect", model, "--traces", run, "--out", tmp_path / "s", "--sites", "resid_post", "--spans", "last_token")
    for arguments, words in (
        ((*contrast, ungraded), "graded"),
        ((*contrast, right), "0 negative"),
        ((*contrast, run, "--kind", "SVD"), "no kind of direction"),
        ((*contrast, run, "--kind", "R", "--by-item"), "within questions"),
        ((*contrast, alone, "--by-item"), "--samples"),
        ((*contrast, tmp_path / "s", "--span", "answer"), "no resid_post/answer"),
        ((*contrast, tmp_path / "s", "--prefix", "4"), "SegmentMeans"),
        ((*contrast, tmp_path / "s", "--choose"), "cannot be asked"),
        ((*contrast, run, "--choose", "--coefficients", "a"), "numbers between commas"),
        ((*contrast, run, "--choose", "--coefficients", "nan"), "finite number"),
        ((*contrast, run, "--choose", "--aim", "better"), "one of shorter"),
        ((*contrast, ungraded, "--choose"), "graded"),
        ((*contrast, steered, "--choose"), "without the steering"),
        ((*contrast, foreign, "--choose"), "was made for"),
        ((*contrast, ungolden, "--choose"), "no gold answer"),
        (("probe", "efficiency", model, "--from", alone, "--out", out), "two correct replies"),
        (("probe", "efficiency", model, "--from", run, "--out", out, "--read-at", "middle"), "--read-at"),
        (("probe", "contrast", tiny_folder("llama"), "--from", tmp_path / "s", "--out", out), "was made for"),
    ):
        error = steer(*arguments, status=2)
        assert words in " ".join(str(error.get(key, "")) for key in ("message", "expected", "remedy")), (words, error)
    assert not out.exists()


def test_what_cannot_be_is_refused_before_anything_is_read(steer: Call, tmp_path: Path) -> None:
    """Neither the model nor the run is there, and the option is what is told."""
    nowhere = (tmp_path / "model", "--from", tmp_path / "run", "--out", tmp_path / "x.safetensors")
    for verb, option, value, words in (
        ("length", "--kind", "SVD", "no kind of direction"),
        ("length", "--span", "tail", "no span"),
        ("length", "--add-at", "attn", "attn"),
        ("length", "--floor", "0.5", "without --choose"),
        ("contrast", "--coefficients", "2", "without --choose"),
        ("contrast", "--scale", "rms", "the scale is"),
        ("contrast", "--inverse-penalty", "0", "C is 0"),
        ("efficiency", "--normalise", "rms", "--normalise rms"),
        ("efficiency", "--controls", "0", "without --choose"),
    ):
        error = steer("probe", verb, *nowhere, option, value, status=2)
        assert words.lower() in error["message"].lower(), (option, error)
    error = steer("probe", "length", *nowhere, "--percentiles", "80", "20", status=2)
    assert "percentiles" in error["message"]
