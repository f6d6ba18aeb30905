"""The whole loop on the mixture of experts in small: what it promises, what it writes, what it refuses; effects at 64 questions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer
from edits.experts import expert_patch
from experiments.bench import MARK, clear_own
from experiments.demo_experts import MODEL, TWIN, ExpertPlan, demo_experts
from experiments.expert_report import examples, render
from experiments.run import Run
from steer import ScaleExperts, Steering
from steer.errors import SteerError
from steer.expert_scores import ExpertScores
from steer.patches import Patch
from tests.experiments.test_report import Reader
from tests.experiments.test_report_browser import shown

SECTIONS = (
    "headline",
    "experts",
    "scaling",
    "controls",
    "edit",
    "verification",
    "twin",
    "traces",
    "limits",
    "provenance",
)


@pytest.fixture(scope="module")
def page(small_experts):
    return small_experts.report.read_text()


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_object_is_what_was_written(small_experts):
    found = json.loads((small_experts.out / "result.json").read_text())
    assert found == json.loads(json.dumps(small_experts.to_dict()))
    assert found["verify"]["bytes_equal"] is True and found["verify"]["passed"] is True
    assert found["verify"]["max_abs_logit_difference"] == 0, "64 is a power of two"
    assert found["patch"]["replies_as_the_hook"] == found["patch"]["replies"] == 12


def test_the_figures_are_those_of_the_runs(small_experts):
    found, runs = small_experts.to_dict(), small_experts.out / "runs"
    scaling = found["scaling"]
    for beta, accuracy, length in zip(
        scaling["betas"], scaling["accuracy"], scaling["mean_thinking_tokens"], strict=True
    ):
        run = Run.load(runs / ("baseline" if beta == 1 else f"found-x{beta:g}"))
        assert (run.accuracy, run.mean_thinking_tokens) == (accuracy, length)
    names = [control["name"].replace(" ", "-") for control in scaling["controls"]]
    assert names == ["random-pair-1", "matched-pair"]
    for name, control in zip(names, scaling["controls"], strict=True):
        assert control["accuracy"][-1] == Run.load(runs / f"{name}-x64").accuracy
    assert Run.load(runs / "twin-own-x4").accuracy == found["twin"]["scaling"]["accuracy"][-1]
    changes = Run.load(runs / "found-x4").traces.meta["changes"]
    identity = steer.load(MODEL, self_check=False).identity
    steering = Steering((ScaleExperts(small_experts.found.experts, 4.0),), identity)
    assert changes == [{"kind": "steering", "fingerprint": steering.fingerprint, "coefficient": 1.0}]


def test_the_files_are_what_was_used(small_experts):
    out = small_experts.out
    assert ExpertScores.load(out / "scores.safetensors") == small_experts.scores
    assert ExpertScores.load(out / "twin-scores.safetensors") == small_experts.twin.scores
    best = small_experts.scores.top(2)
    assert Patch.load(out / "patch.safetensors") == expert_patch(best, 64, MODEL)
    (scaled,) = Steering.load(out / "steering.yaml").interventions
    assert scaled == ScaleExperts(best, 64)


def test_pairs_share_no_expert_and_the_matched_one_lies_in_the_same_layers(small_experts):
    pairs = [small_experts.found.experts, *(control.experts for control in small_experts.controls)]
    assert len({expert for pair in pairs for expert in pair}) == 6
    matched = small_experts.controls[-1].experts
    assert [layer for layer, _ in matched] == [layer for layer, _ in small_experts.found.experts]


def test_fit_and_test_questions_are_apart(small_experts):
    fit, test = ({str(trace.prompt) for trace in run.traces} for run in (small_experts.fit, small_experts.baseline))
    assert len(fit) == 24 and len(test) == 12 and not fit & test


def test_the_checkpoint_is_an_ordinary_one(small_experts):
    """Loaded without us, the output weights of the chosen experts are 64 times the base's and all else is the base's."""
    edited = AutoModelForCausalLM.from_pretrained(small_experts.checkpoint, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(small_experts.base_checkpoint, dtype=torch.float32).state_dict()
    assert edited.keys() == before.keys()
    for name, old in before.items():
        wanted = old.clone()
        for layer, expert in small_experts.found.experts:
            if name == f"model.layers.{layer}.mlp.experts.down_proj":
                wanted[expert] *= 64
        assert torch.equal(edited[name], wanted), name
    changed = [name for name, old in before.items() if not torch.equal(edited[name], old)]
    assert len(changed) == len({layer for layer, _ in small_experts.found.experts})


def test_work_is_told_step_by_step_and_the_same_seed_gives_the_same_replies(small_experts, tmp_path):
    told = []
    plan = replace(small_experts.plan, betas=(1.0, 4.0), control_betas=(1.0, 4.0), edited=4.0, controls=0)
    again = demo_experts(tmp_path / "again", 1, plan=plan, tell=lambda *state: told.append(state))
    assert again.scores == small_experts.scores and again.to_dict()["patch"]["beta"] == 4.0
    for name in ("baseline", "found-x4", "matched-pair-x4", "twin-own-x4"):
        first, second = (result.out / "runs" / name / "traces.jsonl" for result in (small_experts, again))
        assert first.read_bytes() == second.read_bytes(), name
    done = [state[1] for state in told]
    assert done == sorted(done) and told[-1][:3] == ("report", plan.steps, plan.steps)
    assert len(set(done)) == plan.steps + 1 and {state[2] for state in told} == {plan.steps}
    assert (again.out / MARK).read_text().startswith("made_by: steer demo\n")
    clear_own(again.out)
    assert not again.out.exists()


def test_refusals(tmp_path):
    with pytest.raises(SteerError, match="no organism with experts"):
        demo_experts(tmp_path / "demo", model="organism:chain")
    with pytest.raises(SteerError, match="no organism with experts"):
        demo_experts(tmp_path / "demo", twin="organism:chain")
    assert not (tmp_path / "demo").exists()
    with pytest.raises(SteerError, match="exists already"):
        demo_experts(tmp_path)


def test_the_report_has_every_section_and_needs_nothing_else(page, read):
    assert [attributes["id"] for _, attributes in read.tags if attributes.get("id")] == list(SECTIONS)
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert not [tag for tag, _ in read.tags if tag in ("script", "img", "iframe", "object")]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_the_report_says_and_draws_what_was_found(small_experts, page, read):
    text = page.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'")
    assert all(sentence in text for sentence in small_experts.sentences())
    classes = [(tag, attributes.get("class") or "") for tag, attributes in read.tags]
    assert sum(tag == "svg" for tag, _ in classes) == 9
    assert sum(kind == "chosen" for _, kind in classes) == 4, "two experts here, two in the twin"
    assert sum(kind.startswith("cell") for _, kind in classes) == 32
    assert sum(kind == "line main" for _, kind in classes) == 3
    assert sum(kind == "line control" for _, kind in classes) == 6
    assert render(small_experts) == page
    for example in examples(small_experts):
        assert [heading for heading, *_ in example.replies][:2] == ["unchanged", "the experts found × 64"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_everything_is_seen(small_experts, tmp_path, width):
    found, console = shown(small_experts.report, tmp_path, width)
    assert found["scroll"] <= width and found["wide"] == []
    assert list(found["sections"]) == list(SECTIONS)
    assert len(found["svgs"]) == 9
    assert all(w > 250 and h > 100 and marks >= 3 for _, _, w, h, marks in found["svgs"])
    assert found["smallest"] >= 11 and console == ""


@pytest.mark.effects
def test_at_64_questions_the_planted_are_found_and_help_and_nothing_else_does(tmp_path):
    """Margins lie well inside what 192 questions showed (docs/demo.md): +12 points at 4, +20 at 64, the twin −3 at 4."""
    plan = ExpertPlan(
        betas=(0.0, 1.0, 4.0, 64.0), control_betas=(1.0, 4.0, 64.0), twin_betas=(1.0, 4.0),
        questions=64, fit_questions=64, controls=1,
    )  # fmt: skip
    made = demo_experts(tmp_path / "demo", 3, plan=plan)
    assert sorted(made.found.experts) == sorted(made.planted)
    assert made.change(made.found, 0.0).accuracy.high < 0 < made.change(made.found, 64.0).accuracy.low
    assert made.found.at(64.0).mean_thinking_tokens > 1.3 * made.baseline.mean_thinking_tokens
    assert made.beyond(4.0).low > 0 and made.beyond(64.0).low > 0.3
    for control in made.controls:
        assert abs(made.change(control, 4.0).accuracy.value) < 0.1
        assert made.change(control, 64.0).accuracy.high < 0
    assert made.change(made.twin.own, 4.0).accuracy.value < 0.05
    assert made.twin.model == TWIN and made.agreement.passed and made.same_replies == 64
