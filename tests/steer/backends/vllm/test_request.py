"""What callers write, and what the front process makes of it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from steer.backends.vllm.engine import Core, Front, RefusedError
from steer.backends.vllm.library import Library
from steer.backends.vllm.lowering import lower
from steer.backends.vllm.prefix import extra_key
from steer.backends.vllm.request import Asked, Request, effective, marks_from
from steer.backends.vllm.store import Store
from steer.errors import SteerError
from steer.interventions import Add
from steer.steering import Steering
from tests.steer.backends.vllm.made import MARKS, declared, direction, steerings, stored


def front_of(folder, endings=(), speculative=False) -> tuple[Front, dict[str, str]]:
    bases = stored(folder)
    return Front(declared(folder, endings=endings), speculative), bases


def posed(extra: dict | None, tokens=(5, 6, 3, 5)) -> SimpleNamespace:
    """An EngineCoreRequest as far as the front looks at it."""
    return SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=extra, skip_reading_prefix_cache=None),
        prompt_token_ids=list(tokens),
        prompt_embeds=None,
        resumable=False,
    )


def test_a_request_is_resolved_to_what_acts(tmp_path):
    front, bases = front_of(tmp_path)
    request = posed({"other": 1, **Asked("t", bases["thinking"], -2.0, "answer", 1).to_args()})
    front.resolve(request)
    acting = effective(steerings()["thinking"], -2.0, "answer")
    told = Request.from_dict(request.sampling_params.extra_args.pop("steering"))
    assert request.sampling_params.extra_args == {"other": 1}
    assert told == Request(
        acting.fingerprint, bases["thinking"], "t", -2.0, "answer", 4, 1, in_prompt=False, positional=True
    )
    assert [each.phase for each in acting.interventions] == ["answer"] and acting.interventions[0].coefficient == -1.4


def test_no_steering_and_coefficient_zero_run_plain(tmp_path):
    front, bases = front_of(tmp_path)
    for extra in (None, {}, {"other": 1}):
        request = posed(extra)
        front.resolve(request)
        assert request.sampling_params.extra_args == extra
    request = posed(Asked("a", bases["all"], 0.0).to_args())
    front.resolve(request)
    assert request.sampling_params.extra_args == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steering": ""}, "asks for steering ''"),
        ({"steering": 3}, "asks for steering 3"),
        ({"steering_base": None}, "nobody looked the name up"),
        ({"steering_base": "0" * 16}, "has no steering"),
        ({"steering_base": "../../etc"}, "has no steering"),
        ({"steering_coefficient": "2"}, "coefficient is '2'"),
        ({"steering_coefficient": True}, "coefficient is True"),
        ({"steering_coefficient": 10**400}, "coefficient is a whole number of 1329 bits"),
        ({"steering_coefficient": 1e308}, "is beyond 1e[+]30"),
        ({"steering_coefficient": float("nan")}, "coefficient is nan"),
        ({"steering_phase": "later"}, "no phase 'later'"),
        ({"steering_prompt": "talk"}, "prompt is 'talk'"),
        ({"steering_prompt": -1}, "prompt is -1"),
        ({"steering_coeficient": 2}, "steering_coeficient"),
    ],
)
def test_what_is_mistyped_is_refused_and_never_runs_plain(tmp_path, change, said):
    front, bases = front_of(tmp_path)
    with pytest.raises(RefusedError, match=said) as caught:
        front.resolve(posed({**Asked("a", bases["all"]).to_args(), **change}))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, SteerError)


def test_an_engine_without_steering_refuses_a_request_with_it():
    with pytest.raises(RefusedError, match="not started for steering"):
        Front(None, False).resolve(posed(Asked("a", "b").to_args()))


def test_phases_between_marks_need_marks_tokens_and_no_drafts(tmp_path):
    front, bases = front_of(tmp_path, speculative=True)
    with pytest.raises(RefusedError, match="drafts tokens"):
        front.resolve(posed(Asked("t", bases["thinking"]).to_args()))
    front.resolve(posed(Asked("t", bases["thinking"], phase="generated").to_args()))
    for attribute, value in (("prompt_embeds", object()), ("prompt_token_ids", None), ("resumable", True)):
        request = posed(Asked("a", bases["all"]).to_args())
        setattr(request, attribute, value)
        with pytest.raises(RefusedError):
            front.resolve(request)


def test_an_undeclared_layer_fails_the_request(tmp_path):
    front, _ = front_of(tmp_path)
    base = Store(tmp_path).put(Steering((Add(direction((1,), "attn_out", 9), "attn_out"),)))
    with pytest.raises(RefusedError, match="add at attn_out of layers 1, which the engine was not started for; expected layers 0"):  # fmt: skip
        front.resolve(posed(Asked("x", base).to_args()))


def test_the_core_reads_the_same_steering_again(tmp_path):
    front, bases = front_of(tmp_path)
    core = Core(Library(declared(tmp_path)))
    request = posed(Asked("m", bases["mixed"]).to_args())
    with pytest.raises(SteerError, match="what the front process made of it"):
        core.admit(request)
    front.resolve(request)
    core.admit(request)
    request.sampling_params.extra_args["steering"]["fingerprint"] = "f" * 64
    with pytest.raises(SteerError, match="admitted with fingerprint f"):
        Core(Library(declared(tmp_path))).admit(request)
    core.admit(posed({"other": 1}))


def test_marks_count_from_where_the_template_begins_the_reply():
    tokens = (1, 3, 5, 4, 2, 1, 6, 3)
    assert marks_from("chat", tokens, MARKS, [(1, 6), (1, 6, 3), (6, 3)]) == 5
    assert marks_from("raw", tokens, MARKS, []) == 0
    assert marks_from(7, tokens, MARKS, []) == 7
    with pytest.raises(SteerError, match="does not end with what the template appends"):
        marks_from("chat", tokens, MARKS, [(9, 9), ()])
    with pytest.raises(SteerError, match="at most the prompt's 8"):
        marks_from(9, tokens, MARKS, [])


def test_a_store_keeps_what_was_put_there(tmp_path):
    store = Store(tmp_path)
    base = store.put(steerings()["mixed"])
    assert Store(tmp_path).get(base).fingerprint == base == store.put(steerings()["mixed"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [base]
    path = tmp_path / base / "steering.yaml"
    path.write_text(path.read_text().replace("coefficient: 0.7", "coefficient: 0.8"))
    assert store.get(base).fingerprint == base  # Read before.
    with pytest.raises(SteerError, match="as its folder says"):
        Store(tmp_path).get(base)
    with pytest.raises(SteerError, match="no store"):
        Store(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["steering.yaml", "steering.safetensors", "cut"])
def test_what_was_damaged_in_a_store_is_put_there_again(tmp_path, damage):
    base = Store(tmp_path).put(steerings()["mixed"])
    if damage == "cut":
        path = tmp_path / base / "steering.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    else:
        (tmp_path / base / damage).unlink()
    with pytest.raises(SteerError):
        Store(tmp_path).get(base)
    assert Store(tmp_path).put(steerings()["mixed"]) == base
    assert Store(tmp_path).get(base).fingerprint == base
    assert sorted(path.name for path in tmp_path.iterdir()) == [base]
    assert (tmp_path / base).stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_blocks_are_shared_up_to_the_first_steered_token_and_no_further(tmp_path):
    bases = stored(tmp_path)

    def key(name: str, phase: str | None, prompt: int, start: int, end: int, marks: int = 0):
        acting = effective(steerings()[name], 1.0, phase)
        rows = lower(acting)
        told = Request(acting.fingerprint, bases[name], name, 1.0, phase, prompt, marks, rows.first_is_prompt, rows.positional)  # fmt: skip
        return extra_key(told, end)

    assert key("all", None, 10, 0, 4) == key("all", None, 30, 0, 4) == key("all", None, 3, 0, 4) is not None
    assert key("all", "generated", 10, 0, 9) is None and key("all", "generated", 10, 8, 10) is not None
    assert key("all", "generated", 10, 8, 12) != key("all", "generated", 11, 8, 12)
    assert key("all", "prompt", 10, 0, 4) == key("all", "prompt", 30, 0, 4) is not None
    assert key("all", "prompt", 10, 8, 12) != key("all", "prompt", 30, 8, 12)
    assert key("thinking", None, 10, 8, 12, 0) != key("thinking", None, 10, 8, 12, 3)
    assert key("all", None, 10, 0, 4) != key("all", "prompt", 10, 0, 4) != key("project", None, 10, 0, 4)
