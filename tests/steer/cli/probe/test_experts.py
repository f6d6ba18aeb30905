"""`steer probe experts`, as typed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import probes
from probes.experts import expert_scores, recorder_for
from steer.cli import app
from steer.cli.output import Output
from steer.cli.probe.experts import _told_scores
from steer.expert_scores import ExpertScores
from tests.probes import made
from tests.probes.experts import synthetic
from tests.steer.cli.probe.conftest import Call

Folder = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made.traces(12).save(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_gives_scores_a_table_and_pictures(steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path) -> None:
    model, out = tiny_folder("qwen3_moe"), tmp_path / "s.safetensors"
    pictures = ("--plot", tmp_path / "map.png", "--volcano", tmp_path / "volcano.svg")
    found = steer("probe", "experts", model, "--from", run, "--out", out, "--top", 3, "--resamples", 50, *pictures)
    scores = ExpertScores.load(out)
    assert [(row["layer"], row["expert"]) for row in found["experts"]] == list(scores.top(3))
    for row, whole in zip(found["experts"], scores.rows(), strict=False):
        assert row["interval"] == [whole["lower"], whole["upper"]]
        assert {key: row[key] for key in ("score", "p_value", "q_value", "share")} == {
            key: whole[key] for key in ("score", "p_value", "q_value", "share")
        }
    assert [(marker["text"], marker["weight"], marker["ids"]) for marker in found["markers"]] == [
        ("<think>", 1.0, [[made.THINK]]), ("</think>", -1.0, [[made.CLOSE]])
    ]  # fmt: skip
    assert found["scored"] == 8
    assert found["ties"] == [list(expert) for expert in scores.ties(3)]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "volcano.svg").read_text()
    expected = expert_scores(
        probes.collect(made.model("qwen3_moe"), made.traces(12), recorders=[recorder_for({"<think>": 1, "</think>": -1})]),
        {"<think>": 1, "</think>": -1}, resamples=50,
    )  # fmt: skip
    assert scores.values.tolist() == expected.values.tolist()
    assert scores.lower is not None
    assert expected.lower is not None
    assert torch.equal(scores.lower, expected.lower)


def test_a_summary_gives_what_the_run_gives(steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path) -> None:
    model = tiny_folder("olmoe")
    spans = ",".join(f"spans={span}" for span in ("all", "marker:<think>@all", "marker:wait,so@all"))
    steer("collect", model, "--traces", run, "--out", tmp_path / "sum", "--recorder", f"router_counts:{spans}")
    words = ("probe", "experts", model, "--marker", "<think>", "--marker", "-wait,so", "--resamples", 20)
    options = ("--method", "risk_difference", "--correction", "by", "--seed", 4)
    found = [
        steer(*words, *options, "--from", source, "--out", tmp_path / f"{source.name}.safetensors")
        for source in (run, tmp_path / "sum")
    ]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert found[0]["method"] == "risk_difference"
    assert [len(marker["ids"]) for marker in found[0]["markers"]] == [1, 2]
    told = steer(*words, "--marker", "-;", "--from", tmp_path / "sum", "--out", tmp_path / "x.safetensors", status=2)
    assert re.search(r"router_counts:spans=all,spans=marker:<think>@all,spans=marker:wait,so@all,spans=marker:;@all", told["remedy"])  # fmt: skip


def test_interval_and_chances_can_be_left_out(steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path) -> None:
    words = ("probe", "experts", tiny_folder("olmoe"), "--from", run, "--resamples", 0, "--no-null")
    found = steer(*words, "--out", tmp_path / "s.safetensors")
    assert list(found["experts"][0]) == ["layer", "expert", "score", "share", "share of <think>", "share of </think>"]
    assert found["significant"] is None
    told = steer(*words, "--volcano", tmp_path / "v.png", "--out", tmp_path / "t.safetensors", status=2)
    assert "--no-null" in told["message"]


def test_the_table_shows_markers_ties_and_what_a_chance_says(
    tiny_folder: Folder, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["probe", "experts", str(tiny_folder("olmoe")), "--from", str(run), "--resamples", "20"]
    assert app.run([*words, "--out", str(tmp_path / "a.safetensors")]) == 0
    told = capsys.readouterr()
    assert re.search(r"npmi of <think> - </think>, 16 experts of 4 layers, \d+ tokens", told.out)
    assert re.search(r"</think> +-1 +21 +'</think>' \[6\]", told.out)
    q_value = ExpertScores.load(tmp_path / "a.safetensors").q_value
    assert q_value is not None
    found = int((q_value <= 0.05).sum())
    said = "choose them more often" if found else "are not seen to choose any"
    assert re.search(
        rf"{found} of 16 experts have q ≤ 0.05: the markers {said} .*random tokens", " ".join(told.out.split())
    )
    assert "'Alternatively' is no word of this model's tokenizer" in told.err
    assert (
        app.run([*words, "--marker", "+<think>", "--method", "rate_ratio", "--out", str(tmp_path / "b.safetensors")])
        == 0
    )
    tied = ExpertScores.load(tmp_path / "b.safetensors").ties(10)
    assert ("other experts have the score of the last one" in capsys.readouterr().out) == bool(tied)


def test_another_thoughts_word_is_a_marker_where_it_stands(
    steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """The tiny tokenizer has no `Alternatively`, so another of its words stands in for it."""
    model = tiny_folder("olmoe")
    for word, expected in (("hence", ["<think>", "</think>", "hence"]), ("user", ["<think>", "</think>"])):
        monkeypatch.setattr("steer.cli.probe.experts.TURN", word)
        words = ["probe", "experts", str(model), "--resamples", "0", "--no-null"]
        assert app.run([*words, "--from", str(run), "--out", str(tmp_path / f"{word}.safetensors")]) == 0
        assert f"is {'a marker' if len(expected) == 3 else 'no marker'}" in capsys.readouterr().err
        scores = ExpertScores.load(tmp_path / f"{word}.safetensors")
        assert [marker.text for marker in scores.markers] == expected
        assert [marker.sign for marker in scores.markers] == [1, -1, -1][: len(expected)]
    spans = "spans=all,spans=marker:<think>@all,spans=marker:</think>@all"
    steer("collect", model, "--traces", run, "--out", tmp_path / "sum", "--recorder", f"router_counts:{spans}")
    assert app.run([*words, "--from", str(tmp_path / "sum"), "--out", str(tmp_path / "s.safetensors")]) == 0
    assert "The summary does not count 'user'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("qwen3", (), "has no experts.*steer probe heads"),
        ("olmoe", ("--marker", "Alternatively"), "cannot write the marker 'Alternatively'"),
        ("olmoe", ("--marker", "<think>", "--marker", "-user"), "'user' stands at none of the .* tokens.*leave it out"),
        ("olmoe", ("--method", "lift"), "no method 'lift'.*risk_difference"),
        ("olmoe", ("--correction", "none"), "no correction 'none'"),
        ("olmoe", ("--marker", "-"), "names nothing"),
        ("olmoe", ("--marker", "so", "--marker", "-so"), "names a marker again"),
        ("olmoe", ("--volcano", "v.gif"), "ends in .gif"),
    ],
)
def test_bad_input_is_refused_in_one_paragraph(
    steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path, family: str, options: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "s.safetensors"
    told = steer("probe", "experts", tiny_folder(family), "--from", run, "--out", out, *options, status=2)
    assert re.search(words, told["message"], re.IGNORECASE), told["message"]
    assert "\n" not in told["message"]
    assert not out.exists()


def test_a_summary_of_groups_says_what_is_missing(steer: Call, tiny_folder: Folder, run: Path, tmp_path: Path) -> None:
    model = tiny_folder("olmoe")
    spans = "spans=all,spans=marker:<think>@all"
    steer("collect", model, "--traces", run, "--out", tmp_path / "sum", "--keep", "group", "--recorder", f"router_counts:{spans}")  # fmt: skip
    words = ("probe", "experts", model, "--from", tmp_path / "sum", "--marker", "<think>")
    told = steer(*words, "--out", tmp_path / "a.safetensors", status=2)
    assert "--resamples 0 --no-null" in told["remedy"]
    found = steer(*words, "--resamples", 0, "--no-null", "--out", tmp_path / "b.safetensors")
    assert found["experts"][0]["score"] is not None


def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    steer: Call, tiny_folder: Folder, tmp_path: Path
) -> None:
    words = (
        "probe",
        "experts",
        tiny_folder("olmoe"),
        "--from",
        tmp_path / "nothing",
        "--out",
        tmp_path / "s.safetensors",
    )
    for option, word in (("--method", "lift"), ("--correction", "no")):
        assert f"'{word}'" in steer(*words, option, word, status=2)["message"]


def test_chances_are_told_for_what_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An expert that follows a marker, and experts that do not."""
    for name, tied, words in (("tied", {(1, 5): made.THINK}, "more often"), ("free", {}, "0 of 32 experts")):
        given = synthetic.traces(3, questions=30)
        scores = expert_scores(synthetic.summary(given, synthetic.routed(given, 3, tied=tied), {"<think>": 1.0}), {"<think>": 1.0}, resamples=0)  # fmt: skip
        _told_scores(scores, tmp_path / name, 3, Output(False, True))
        told = " ".join(capsys.readouterr().out.split())
        assert words in told
        assert ("not seen to choose any" in told) == (not tied)
