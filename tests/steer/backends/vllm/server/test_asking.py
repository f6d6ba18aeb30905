from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.backends.vllm import request
from steer.backends.vllm.server.asking import (
    OFF,
    PLAIN,
    Ask,
    RequestError,
    Served,
    decide,
    rewritten,
    said,
    who,
)  # fmt: skip
from steer.backends.vllm.server.directory import Directory, Entry
from steer.backends.vllm.server.settings import Key, Settings, parse
from steer.steering import Steering
from tests.steer.backends.vllm.server.serving import adapter, adding, only_scaling

TEAM = Key(env="A_KEY", allow=("calm",))


@pytest.fixture
def folder(tmp_path: Path) -> Directory:
    adding(0).save(tmp_path / "calm.yaml")
    adding(1, coefficient=2.0, phase="thinking").save(tmp_path / "brief.yaml")
    Steering((only_scaling(),)).save(tmp_path / "without.yaml")
    (tmp_path / "broken.yaml").write_text("{")
    adapter(tmp_path / "tuned")
    return Directory(tmp_path)


def status(action: Any, *words: str) -> int:
    with pytest.raises(RequestError) as caught:
        action()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    return caught.value.status


def asking(**words: Any) -> dict[str, Any]:
    return {"model": "m", "vllm_xargs": words}


def test_a_body_says_name_coefficient_and_phase() -> None:
    assert said({"model": "m"}) == said(asking()) == said({"vllm_xargs": None}) == Ask()
    full = asking(steering="calm", steering_coefficient=2, steering_phase="answer", other=[1])
    assert said(full) == Ask("calm", 2.0, "answer")
    assert said(asking(steering="calm", steering_coefficient=None)) == Ask("calm")


@pytest.mark.parametrize(
    "words",
    [
        {"steering_base": "a" * 64}, {"steering_prompt": "chat"}, {"steering_coeficient": 1}, {"Steering": "calm"},
        {"steering": ""}, {"steering": 3}, {"steering": ["calm"]}, {"steering": {"fingerprint": "a"}},
        {"steering_coefficient": True}, {"steering_coefficient": "1"}, {"steering_coefficient": 10**400},
        {"steering_coefficient": float("nan")}, {"steering_phase": "dreaming"}, {"steering_phase": 1},
        {"steering_capture": "resid_post"},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(words: dict[str, Any], folder: Directory) -> None:
    assert status(lambda: decide(said(asking(**{"steering": "calm", **words})), Settings(), None, folder)) == 400


def test_words_beside_vllm_xargs_are_refused_instead_of_ignored() -> None:
    assert status(lambda: said({"steering": "calm"}), "vllm_xargs") == 400
    assert status(lambda: said({"steering": "calm", **asking(steering="calm")}), "vllm_xargs") == 400
    assert status(lambda: said({"vllm_xargs": "steering"}), "no object") == 400


def test_a_name_is_served_as_it_lies_there(folder: Directory) -> None:
    served = decide(Ask("calm", 0.5, "answer"), Settings(), None, folder)
    assert (served.name, served.coefficient, served.phase) == ("calm", 0.5, "answer")
    assert served.told() == {
        "steering": "calm", "fingerprint": adding(0).fingerprint, "coefficient": 0.5, "phase": "answer",
    }  # fmt: skip
    assert dict(served.headers) == {
        b"x-steering": b"calm", b"x-steering-fingerprint": adding(0).fingerprint.encode(),
        b"x-steering-coefficient": b"0.5", b"x-steering-phase": b"answer",
    }  # fmt: skip
    assert decide(Ask("calm"), Settings(), None, folder).told()["phase"] == "own"


def test_an_unknown_name_gets_the_list_and_a_broken_one_the_reason(folder: Directory) -> None:
    assert status(lambda: decide(Ask("clam"), Settings(), None, folder), "clam", "none, brief, broken, calm") == 400
    assert status(lambda: decide(Ask("broken"), Settings(), None, folder), "broken", "not YAML") == 400
    everything = Key(env="B")
    assert status(lambda: decide(Ask("../calm"), Settings(), everything, folder), "calm") == 400


def test_limits_hold_per_steering(folder: Directory) -> None:
    settings = parse({"coefficients": [-1.0, 1.0], "limits": {"brief": [0.0, 3.0]}}, "x")
    assert decide(Ask("brief", 3.0), settings, None, folder).coefficient == 3
    assert status(lambda: decide(Ask("calm", 3.0), settings, None, folder), "-1 to 1", "'calm'") == 400
    assert status(lambda: decide(Ask("brief", -0.1), settings, None, folder), "0 to 3") == 400
    assert status(lambda: decide(Ask("without", 2.0), Settings(), None, folder), "multiplies weights by -1") == 400


def test_a_key_may_ask_for_what_it_is_allowed(folder: Directory) -> None:
    assert decide(Ask("calm"), Settings(), TEAM, folder).name == "calm"
    for name in ("brief", "nothing-of-this-name"):
        assert status(lambda name=name: decide(Ask(name), Settings(), TEAM, folder), "calm") == 403
    assert decide(Ask(), Settings(), TEAM, folder) == PLAIN
    default = parse({"default": {"steering": "brief"}}, "x")
    assert decide(Ask(), default, TEAM, folder).name == "brief", "the default is the operator's"
    assert status(lambda: decide(Ask("none"), default, TEAM, folder)) == 403
    assert decide(Ask("none"), default, Key(env="B", allow=("none",)), folder) == PLAIN


def test_the_default_serves_whoever_names_nothing(folder: Directory) -> None:
    settings = parse(
        {"default": {"steering": "calm", "coefficient": 7.0, "phase": "answer"}, "coefficients": [0, 1]}, "x"
    )
    served = decide(Ask(), settings, None, folder)
    assert (served.name, served.coefficient, served.phase) == ("calm", 7.0, "answer")
    assert decide(Ask("none"), settings, None, folder) == PLAIN
    assert status(lambda: decide(Ask(None, 0.5), settings, None, folder), "by name") == 400
    assert status(lambda: decide(Ask("none", 0.5), settings, None, folder), "no steering") == 400
    assert status(lambda: decide(Ask(None, 0.5), Settings(), None, folder), "no steering") == 400
    gone = parse({"default": {"steering": "gone"}}, "x")
    assert status(lambda: decide(Ask(), gone, None, folder), "gone") == 400


def test_the_switch_turns_everything_off(folder: Directory) -> None:
    off = parse({"enabled": False, "default": {"steering": "calm"}}, "x")
    for ask in (Ask(), Ask("calm", 2.0), Ask("broken"), Ask("clam"), Ask("tuned")):
        assert decide(ask, off, TEAM, folder) == OFF
    assert OFF.headers == ((b"x-steering", b"off"),)
    changed = rewritten(asking(steering="calm", other=1), OFF, "chat", "", (), "m")
    assert changed == {"model": "m", "vllm_xargs": {"other": 1}}


def test_a_strength_at_which_nothing_is_left_is_no_steering_and_says_so(folder: Directory) -> None:
    assert decide(Ask("calm", 0.0), Settings(), None, folder) == PLAIN
    assert PLAIN.told() == {"steering": "none"}


def test_adapters_are_chosen_by_the_same_word_and_have_no_strength(folder: Directory) -> None:
    served = decide(Ask("tuned"), Settings(), None, folder)
    assert rewritten(asking(steering="tuned"), served, "chat", "", ("tuned",), "m") == {"model": "tuned"}
    assert rewritten({"vllm_xargs": {"steering": "tuned"}}, served, "chat", "", ("tuned",), "m") == {"model": "tuned"}
    assert rewritten({**asking(steering="tuned"), "model": "x"}, served, "chat", "", ("tuned",), "m") == {"model": "x"}
    assert decide(Ask("tuned", 1.0, "all"), Settings(), None, folder).entry == served.entry
    for ask in (Ask("tuned", 0.5), Ask("tuned", None, "thinking"), Ask("tuned", 0.0)):
        assert status(lambda ask=ask: decide(ask, Settings(), None, folder), "steer export") == 400
    asked_as_model = {"model": "tuned"}
    assert status(lambda: rewritten(asked_as_model, PLAIN, "chat", "", ("tuned",), "m"), "as a model") == 400


def test_what_vllm_is_told_is_what_the_engine_reads(folder: Directory) -> None:
    served = decide(Ask("calm", 0.5), Settings(), None, folder)
    body = rewritten(
        {**asking(steering="calm", steering_coefficient=0.5, other=1), "n": 2}, served, "chat", "f00", (), "m"
    )
    assert body["model"] == "m" and body["n"] == 2 and body["vllm_xargs"].pop("other") == 1
    assert request.asked(body["vllm_xargs"]) == request.Asked("calm", "f00", 0.5, None, "chat")
    assert rewritten({"model": "m"}, PLAIN, "raw", "", (), "m") == {"model": "m"}


@pytest.mark.parametrize("word", ["use_beam_search", "prompt_embeds"])
def test_what_vllm_runs_without_the_requests_arguments_is_refused(word: str, folder: Directory) -> None:
    served = decide(Ask("calm"), Settings(), None, folder)
    body = {**asking(steering="calm"), word: True}
    assert status(lambda: rewritten(body, served, "raw", "f00", (), "m"), word) == 400
    assert rewritten(body, PLAIN, "raw", "", (), "m")[word] is True


def test_keys_are_told_apart_and_compared_whole() -> None:
    keys = (("one", Key(env="A")), ("two", Key(env="B")))
    assert who(None, ()) is None and who("Bearer x", ()) is None
    assert who("Bearer two", keys) == keys[1][1] and who("bearer one", keys) == keys[0][1]
    for shown in (None, "", "one", "Basic one", "Bearer", "Bearer on", "Bearer one ", "Bearer onetwo", "Bearer \udce9"):
        assert status(lambda shown=shown: who(shown, keys), "Bearer") == 401


def test_a_key_may_have_any_letters() -> None:
    keys = (("schlüssel", Key(env="A")),)
    sent = "Bearer schlüssel".encode().decode("latin-1")  # As a middleware reads the bytes of a header.
    assert who(sent, keys) == keys[0][1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KNOWN = st.sampled_from(
    ["steering", "steering_coefficient", "steering_phase", "steering_base", "model", "use_beam_search"]
)
ARGUMENTS = st.dictionaries(KNOWN, JSON | st.just("calm"), max_size=4)
BODY = st.dictionaries(KNOWN | st.just("vllm_xargs") | st.text(max_size=6), JSON, max_size=5) | st.fixed_dictionaries(
    {"vllm_xargs": ARGUMENTS}, optional={"model": JSON, "use_beam_search": JSON}
)


class One:
    """An offer of one steering."""

    entry = Entry("calm", adding(0), adding(0).fingerprint, 0.0, 1)

    def names(self) -> tuple[str, ...]:
        return ("calm",)

    def find(self, name: str, most: int) -> Entry | None:
        return self.entry if name == "calm" else None


@given(BODY, st.booleans())
def test_any_body_is_refused_or_served_by_exactly_what_it_names(body: dict[str, Any], enabled: bool) -> None:
    settings = Settings(enabled=enabled)
    try:
        served = decide(said(body), settings, None, One())
        changed = rewritten(body, served, "raw", "f00", (), "m")
    except RequestError as refusal:
        assert 400 <= refusal.status < 500
        return
    told = request.asked(changed.get("vllm_xargs"))
    named = (body.get("vllm_xargs") or {}).get("steering")
    assert (told is not None) == (isinstance(served, Served) and served.entry is not None)
    assert told is None or (told.name == named == "calm" and told.base == "f00" and enabled)
    assert told is not None or not enabled or named in (None, "none") or served.coefficient in (0, 1)
    kept, came = ({word: value for word, value in each.items() if word != "vllm_xargs"} for each in (changed, body))
    assert repr(kept) == repr(came)
