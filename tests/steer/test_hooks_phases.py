"""Phases in the hooks: only the positions of a phase change, in one forward pass and token by token, and are counted."""

from __future__ import annotations

import warnings

import pytest
import torch

import steer
from steer import Add, Custom, Direction, ProjectOut, SetComponent, SteerError, Steering
from steer.phases import Marks, State, states_of
from steer.positions import Positions
from tests.steer import naive

# <think> is 5, </think> is 6.
SEQUENCE = [3, 14, 15, 9, 5, 20, 21, 22, 6, 30, 31]
PROMPT = 4
PHASES = ("prompt", "opening", "generated", "thinking", "answer", "all")


def direction(site="resid_post", width=(48,)):
    return Direction(torch.randn(2, *width, generator=torch.Generator().manual_seed(3)), (1, 2), site)


def where(phase):
    states = states_of(SEQUENCE, PROMPT, Marks(((5,),), ((6,),)))
    wanted = {"all": set(State), "generated": {State.OPENING, State.THINKING, State.ANSWER}}.get(
        phase, {State[phase.upper()]} if phase.upper() in State.__members__ else set()
    )
    return torch.tensor([state in wanted for state in states])


def masked(edit, mask):
    def apply(h):
        return torch.where(mask.reshape(1, -1, *[1] * (h.dim() - 2)), edit(h), h)

    return apply


@pytest.mark.parametrize("site", naive.SITES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_changes_its_own_positions_only(tiny, phase, site):
    hf, tokenizer = tiny("granite", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction(site, (4, 12) if site == "z" else (48,))
    mask = where(phase)
    assert mask.any()
    for intervention, formula in (
        (Add(d, site, phase=phase), lambda v: naive.add(v, 1.0)),
        (ProjectOut(d, site, phase=phase), lambda v: naive.project_out(v, 1.0)),
        (SetComponent(d, site, 2.0, phase=phase), lambda v: naive.set_component(v, 2.0)),
    ):
        with model.steered(Steering((intervention,))) as report:
            hooked = model.run([SEQUENCE], [PROMPT])[0]
        with naive.rewritten(hf, {(layer, site): masked(formula(d[layer]), mask) for layer in (1, 2)}):
            expected = model.run([SEQUENCE], [PROMPT])[0]
        torch.testing.assert_close(hooked, expected, rtol=1e-9, atol=1e-9)
        assert report.touched == {(layer, site): {phase: int(mask.sum())} for layer in (1, 2)}


def test_interventions_of_several_phases_at_one_place(tiny):
    hf, tokenizer = tiny("llama", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction()
    steering = Steering(
        (
            Add(d, "resid_post", coefficient=1.0, phase="thinking"),
            Add(d, "resid_post", coefficient=2.0, phase="thinking"),
            Add(d, "resid_post", coefficient=0.5),
            ProjectOut(d, "resid_post", weight=0.5, phase="answer"),
        )
    )
    thinking, answer = where("thinking"), where("answer")

    def edits(v):
        def edit(h):
            return masked(naive.project_out(v, 0.5), answer)(naive.add(v, 0.5)(masked(naive.add(v, 3.0), thinking)(h)))

        return edit

    with model.steered(steering) as report:
        hooked = model.run([SEQUENCE], [PROMPT])[0]
    with naive.rewritten(hf, {(layer, "resid_post"): edits(d[layer]) for layer in (1, 2)}):
        torch.testing.assert_close(hooked, model.run([SEQUENCE], [PROMPT])[0], rtol=1e-9, atol=1e-9)
    assert report.touched[1, "resid_post"] == {
        "thinking": int(thinking.sum()),
        "all": len(SEQUENCE),
        "answer": int(answer.sum()),
    }


def test_head_out_within_a_phase(tiny):
    hf, tokenizer = tiny("qwen3", dtype=torch.float64)
    model = steer.wrap(hf, tokenizer)
    d = direction()
    with model.steered(Steering((ProjectOut(d, "head_out", heads=((1, 2), (2, 0)), phase="thinking"),))):
        hooked = model.run([SEQUENCE], [PROMPT])[0]
    mask = where("thinking")
    edits = {
        (layer, f"head_out {head}"): masked(naive.project_out(d[layer], 1.0), mask) for layer, head in ((1, 2), (2, 0))
    }
    with naive.rewritten(hf, edits):
        torch.testing.assert_close(hooked, model.run([SEQUENCE], [PROMPT])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "olmo2", "qwen3_moe"])
def test_token_by_token_with_a_cache_equals_one_pass(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    d = direction()
    steering = Steering(
        (
            Add(d, "resid_post", phase="thinking"),
            ProjectOut(d, "resid_mid", phase="answer"),
            Add(d, "attn_out", phase="prompt"),
        )
    )
    with model.steered(steering) as whole_report:
        whole = model.run([SEQUENCE], [PROMPT])[0]
    positions = Positions(model.marks, [PROMPT], [0])
    pieces, cache = [], None
    with torch.no_grad(), model.steered(steering) as report:
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 11)):
            with model.at(positions):
                output = hf(input_ids=torch.tensor([SEQUENCE[start:end]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits[0])
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)
    assert report.touched == whole_report.touched


def test_without_positions_only_phase_all_runs(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    ids = torch.tensor([[8, 9]])
    with (
        pytest.raises(SteerError, match=r"thinking.*m\.generate"),
        model.steered(Steering((Add(direction(), "resid_post", phase="thinking"),))),
    ):
        hf(input_ids=ids)
    with model.steered(Steering((Add(direction(), "resid_post"),))):
        hf.generate(ids, max_new_tokens=2)
    with (
        pytest.raises(SteerError, match="generated"),
        model.steered(Steering((Add(direction(), "resid_post", phase="generated"),))),
    ):
        hf.generate(ids, max_new_tokens=2)


def test_a_phase_that_has_left_no_longer_needs_positions(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    with model.steered(Steering((Add(direction(), "resid_post"),))):
        with model.steered(Steering((Add(direction(), "resid_post", phase="prompt"),))):
            model.run([SEQUENCE], [PROMPT])
        hf(input_ids=torch.tensor([SEQUENCE]))


def test_phases_need_marks(tiny):
    hf, _ = tiny("llama")
    model = steer.wrap(hf, None)
    with (
        pytest.raises(SteerError, match="marks"),
        model.steered(Steering((Add(direction(), "resid_post", phase="thinking"),))),
    ):
        pass
    with model.steered(Steering((Add(direction(), "resid_post", phase="generated"),))) as report:
        model.run([SEQUENCE], [PROMPT])
    assert report.touched[1, "resid_post"] == {"generated": len(SEQUENCE) - PROMPT + 1}


def test_a_custom_function_may_be_undefined_outside_its_phase(tiny):
    model = steer.wrap(*tiny("llama"))
    mask = where("thinking")

    def only_there(h, layer):
        return torch.where(mask.reshape(1, -1, 1), torch.ones_like(h), torch.full_like(h, torch.nan))

    with model.steered(Steering((Custom(only_there, "resid_post", (1,), phase="thinking"),))):
        assert torch.isfinite(model.run([SEQUENCE], [PROMPT])[0]).all()


def test_nothing_touched_is_said(tiny):
    model = steer.wrap(*tiny("llama"))
    steering = Steering((Add(direction(), "resid_post", phase="answer"),), name="late")
    with pytest.warns(UserWarning, match=r"'late' touched 0 positions.*answer"), model.steered(steering) as report:
        model.run([[3, 14, 15]], [2])
    assert report.untouched == [(1, "resid_post", "answer"), (2, "resid_post", "answer")]
    with (
        pytest.warns(UserWarning, match="touched 0 positions"),
        model.steered(Steering((Add(direction(), "resid_post"),))),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.steered(Steering((Add(direction(), "resid_post"),)), coefficient=0.0) as report:
            model.run([[3, 14, 15]], [2])
    assert str(report).startswith("steered 0 positions")
    with pytest.raises(ValueError, match="my own"), model.steered(steering):
        raise ValueError("my own")  # An exception is not hidden behind a warning.
