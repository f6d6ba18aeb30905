"""The whole loop in small: every promise of `steer demo --json`, and what is refused. Effects have a lane of their own."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from edits.thinkedit import thinkedit
from experiments.bench import MARK, clear_own
from experiments.changes import short_share
from experiments.demo import Plan, demo
from experiments.run import Run
from steer.directions import Direction
from steer.errors import SteerError
from steer.patches import Patch
from steer.scores import HeadScores
from steer.steering import Steering

KEYS = {
    "baseline": {"accuracy", "mean_thinking_tokens", "short_share"},
    "direction": {"layers", "held_out", "held_out_prefix"},
    "causal_share": {"sets", "traces", "total_is_clear"},
    "side_effects": {"steerings", "units", "read"},
    "steering": {"coefficients", "mean_thinking_tokens", "accuracy", "control_mean_thinking_tokens"},
    "thinkedit": {
        "heads",
        "short_share_before",
        "short_share_after",
        "accuracy_before",
        "accuracy_after",
        "control_accuracy_after",
    },
    "verify": {"bytes_equal", "max_abs_logit_difference", "floor"},
}


def test_the_object_has_the_promised_keys(small_demo):
    found = json.loads((small_demo.out / "result.json").read_text())
    assert found == json.loads(json.dumps(small_demo.to_dict()))
    assert {"model", "base_checkpoint", "checkpoint", "report", "seconds", *KEYS} <= set(found)
    for name, keys in KEYS.items():
        assert keys <= set(found[name]), name
    steering = found["steering"]
    assert len({len(steering[key]) for key in KEYS["steering"]}) == 1 and len(steering["coefficients"]) == 5
    assert steering["coefficients"] == sorted(steering["coefficients"]) and 0.0 in steering["coefficients"]
    assert found["verify"]["bytes_equal"] is True and found["verify"]["passed"] is True
    assert found["verify"]["max_abs_logit_difference"] <= 3 * found["verify"]["floor"]
    assert found["thinkedit"]["accuracy_before"] == found["baseline"]["accuracy"]


def test_the_figures_are_those_of_the_runs(small_demo):
    found, runs = small_demo.to_dict(), small_demo.out / "runs"
    plain, edited = Run.load(runs / "baseline"), Run.load(runs / "thinkedit")
    middle = found["steering"]["coefficients"].index(0.0)
    assert found["steering"]["accuracy"][middle] == found["baseline"]["accuracy"] == plain.accuracy
    assert found["steering"]["control_mean_thinking_tokens"][middle] == plain.mean_thinking_tokens
    assert found["thinkedit"]["accuracy_after"] == edited.accuracy
    assert found["thinkedit"]["short_share_after"] == short_share(edited)
    ends = [Run.load(runs / f"steered{c:+g}").mean_thinking_tokens for c in found["steering"]["coefficients"] if c]
    assert [
        n
        for c, n in zip(found["steering"]["coefficients"], found["steering"]["mean_thinking_tokens"], strict=True)
        if c
    ] == ends
    change = small_demo.change(small_demo.edit)
    assert change.accuracy.value == pytest.approx(edited.accuracy - plain.accuracy, abs=2e-6)
    assert change.short_share.value == pytest.approx(short_share(edited) - short_share(plain), abs=2e-6)


def test_fit_and_test_questions_are_apart(small_demo):
    fit, test = ({str(trace.prompt) for trace in run.traces} for run in (small_demo.fit, small_demo.baseline))
    assert len(fit) == 60 and len(test) == 12 and not fit & test


def test_the_files_are_what_was_used(small_demo, organism):
    out = small_demo.out
    direction, scores = Direction.load(out / "direction.safetensors"), HeadScores.load(out / "scores.safetensors")
    assert direction == small_demo.direction and scores == small_demo.scores
    assert small_demo.edit.heads == scores.top(small_demo.plan.heads)
    assert Patch.load(out / "patch.safetensors") == thinkedit(direction, small_demo.edit.heads)
    steering = Steering.load(out / "steering.yaml")
    assert steering.interventions[0].active_layers == small_demo.plan.layers
    changes = Run.load(out / "runs" / f"steered{small_demo.plan.coefficients[0]:+g}").traces.meta["changes"]
    assert changes == [
        {"kind": "steering", "fingerprint": steering.fingerprint, "coefficient": small_demo.plan.coefficients[0]}
    ]
    assert not set(small_demo.random_heads[0].heads) & set(small_demo.edit.heads)


def test_the_checkpoint_is_an_ordinary_one(small_demo, organism):
    """Loaded without us, only the chosen columns of the chosen layers differ from the base."""
    edited = AutoModelForCausalLM.from_pretrained(small_demo.checkpoint, dtype=torch.float32).state_dict()
    width = organism.anatomy.head_width
    for name, before in organism.hf.state_dict().items():
        changed = (before != edited[name]).any(0).nonzero().flatten() if before.dim() == 2 else torch.zeros(0)
        parts = name.split(".")
        heads = [h for layer, h in small_demo.edit.heads if parts[:3] == ["model", "layers", str(layer)]]
        allowed = {c for h in heads for c in range(h * width, (h + 1) * width)} if "o_proj" in name else set()
        assert set(changed.tolist()) <= allowed, name
        assert not heads or "o_proj" not in name or len(changed), "the edit is there"


def test_the_same_seed_gives_the_same_replies_and_the_work_is_told(small_demo, tmp_path):
    plan, told = replace(small_demo.plan, coefficients=(-0.5, 0.0)), []
    again = demo(tmp_path / "again", 1, plan=plan, tell=lambda *state: told.append(state))
    runs = sorted(folder.name for folder in (again.out / "runs").iterdir())
    assert len(runs) == 8
    for name in runs:
        first, second = (result.out / "runs" / name / "traces.jsonl" for result in (small_demo, again))
        assert first.read_bytes() == second.read_bytes(), name
    first, second = small_demo.to_dict(), again.to_dict()
    for name in ("thinkedit", "direction", "causal_share"):
        assert second[name] == first[name], name
    assert second["side_effects"]["steerings"] == first["side_effects"]["steerings"][:2], "the end at -0.5"
    done = [state[1] for state in told]
    assert done == sorted(done) and told[-1][:3] == ("report", plan.steps, plan.steps)
    assert max(done) == plan.steps and {state[2] for state in told} == {plan.steps}


def test_the_plan_is_the_cards():
    card = {
        "steering": {"span": "marker:;", "site": "attn_out", "layers": [1], "coefficients": [-1, 0, 1]},
        "thinkedit": {"span": "marker:;", "heads": 2},
    }
    plan = Plan.of(card)
    assert (plan.span, plan.other_span, plan.layers, plan.heads) == ("marker:;", "predicts_thinking", (1,), 2)
    assert plan.coefficients == (-1.0, 0.0, 1.0) and plan.percentiles == (20.0, 80.0)
    assert Plan.of(card | {"percentiles": [10, 90]}).percentiles == (10.0, 90.0)


def test_refusals(tmp_path, tiny_folder):
    with pytest.raises(SteerError, match="no organism"):
        demo(tmp_path / "demo", model=str(tiny_folder("qwen3")))
    assert not (tmp_path / "demo").exists()
    with pytest.raises(SteerError, match="exists already"):
        demo(tmp_path)


def test_only_a_demo_is_replaced_by_a_demo(tmp_path):
    clear_own(tmp_path / "none")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(SteerError, match="not made by the demo"):
        clear_own(mine)
    (mine / MARK).write_text("made_by: someone else\n")
    with pytest.raises(SteerError, match="not made by the demo"):
        clear_own(mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    (mine / MARK).write_text("made_by: steer demo\nseed: 0\n")
    clear_own(mine)
    assert not mine.exists()


def test_threads_are_given_back(small_demo):
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        with pytest.raises(SteerError, match="no organism"):
            demo("never", model=str(small_demo.checkpoint))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
