"""`steer serve`, asked with the client of OpenAI: every reply is what plain hooks write, or says why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.vllm import served
from tests.vllm.lab import CLEAR, SAME, Bench, farthest

pytestmark = pytest.mark.vllm
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def chain(bench: Callable[[str], Bench]) -> Bench:
    return bench("chain")


@pytest.fixture(scope="module")
def seen(chain: Bench) -> Seen:
    return served.seen(chain)


@pytest.mark.parametrize("number", range(len(served.asks())))
def test_both_endpoints_write_what_plain_hooks_write_and_say_by_what(chain: Bench, seen: Seen, number: int) -> None:
    asked, reply = served.asks()[number], seen["alone"]["whole"][number]
    prompt, reference = served.expected(chain, asked)
    assert min(reference.margins) > CLEAR, "take another prompt"
    assert reply["prompt"] == list(prompt) and reply["tokens"] == reference.tokens
    assert farthest(reply["logprobs"], reference.logprobs) <= SAME
    told = {
        f"x-steering-{word}" if word != "steering" else "x-steering": value for word, value in reply["steering"].items()
    }
    assert {name: str(value) for name, value in told.items()} == reply["headers"]
    assert reply["headers"]["x-steering"] == (asked.name or "none")
    if asked.name not in (None, "heads"):
        assert reply["steering"]["fingerprint"] == served.ours(chain)[str(asked.name)].fingerprint
        assert (reply["steering"]["coefficient"], reply["steering"]["phase"]) == (
            asked.coefficient,
            asked.phase or "own",
        )
    if asked.name is not None:
        plain = served.expected(chain, served.Asked(asked.chat, asked.content))[1]
        assert farthest(plain.logprobs, reference.logprobs) > 100 * SAME, "it is hardly steered"


def test_a_stream_is_the_same_reply_with_the_same_headers(seen: Seen) -> None:
    for whole, streamed in zip(seen["alone"]["whole"], seen["alone"]["streamed"], strict=True):
        assert streamed["text"] == whole["text"] and streamed["headers"] == whole["headers"] and streamed["pieces"] > 10


def test_the_thinking_budget_of_vllm_holds_under_steering(chain: Bench, seen: Seen) -> None:
    reply = seen["alone"]["others"]["budget"]
    ((opening,),), ((closing,),) = chain.marks.opening, chain.marks.closing
    assert reply["headers"]["x-steering"] == "add"
    tokens = reply["tokens"]
    assert tokens.index(closing) - tokens.index(opening) - 1 == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown", ["clam", "none, add, broken, changing, heads, other, parts, unfit"]),
        ("limit", ["0 to 2", "other"]),
        ("not finite", ["beyond 1e+30"]),
        ("phase", ["dreaming"]),
        ("no form", ["SetComponent", "no form"]),
        ("broken", ["not YAML"]),
        ("fingerprint", ["steering_base"]),
        ("beams", ["use_beam_search"]),
        ("strength of weights", ["adapter", "steer export"]),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(seen: Seen, name: str, words: list[str]) -> None:
    reply = seen["refusals"]["asked"][name]
    assert reply["status"] == 400
    assert all(word in reply["error"] for word in words), reply["error"]


def test_keys_decide_who_may_ask_for_what(seen: Seen) -> None:
    found = {name: reply["status"] for name, reply in seen["refusals"]["asked"].items() if ": " in name}
    assert found == {
        "team: add": 200, "team: other": 403, "team: none": 200,
        "nobody: add": 401, "nobody: other": 401, "nobody: none": 401,
    }  # fmt: skip
    assert [row["name"] for row in seen["refusals"]["team"]["steerings"]] == ["add"]


def test_malformed_requests_are_refused_and_the_server_lives_on(seen: Seen) -> None:
    found = seen["refusals"]["malformed"]
    assert found.pop("too large") == 413 and found.pop("another endpoint") == 404
    assert set(found.values()) == {400}
    assert seen["refusals"]["health"] == 200
    assert seen["refusals"]["after"] == seen["alone"]["whole"][0]


def test_the_list_says_what_is_there_and_what_cannot_be_served(chain: Bench, seen: Seen) -> None:
    listed = seen["refusals"]["listed"]
    rows = {row["name"]: row for row in listed["steerings"]}
    assert listed["enabled"] and listed["model"] == "chain" and listed["default"] is None
    assert {name for name, row in rows.items() if row["servable"]} == {"add", "changing", "heads", "other", "parts"}
    assert rows["parts"]["sites"] == ["attn_out", "mlp_out", "resid_mid", "resid_post"]
    assert rows["heads"]["kind"] == "adapter" and rows["other"]["coefficients"] == [0.0, 2.0]
    assert rows["add"]["fingerprint"] == served.ours(chain)["add"].fingerprint


def test_a_changed_file_is_another_steering_and_running_replies_keep_theirs(chain: Bench, seen: Seen) -> None:
    found, old, new = seen["changes"], served.ours(chain)["changing"], served.changed(chain)
    first, other = (served.expected(chain, served.CHANGING, steering)[1].tokens for steering in (old, new))
    assert first != other
    assert found["before"]["tokens"] == first and found["before"]["steering"]["fingerprint"] == old.fingerprint
    assert found["running"]["text"] == found["before"]["text"]
    assert found["running"]["headers"]["x-steering-fingerprint"] == old.fingerprint
    assert found["after"]["tokens"] == other and found["after"]["steering"]["fingerprint"] == new.fingerprint
    assert found["broken"]["status"] == 400 and "not YAML" in found["broken"]["error"]
    assert found["back"] == found["before"]


def test_the_switch_turns_everything_off_and_says_so(chain: Bench, seen: Seen) -> None:
    off, plain = seen["changes"]["off"], served.Asked(True, served.CHANGING.content, tokens=served.CHANGING.tokens)
    assert off["headers"] == {"x-steering": "off"} and off["steering"] == {"steering": "off"}
    assert off["tokens"] == served.expected(chain, plain)[1].tokens
    assert seen["changes"]["on"] == seen["changes"]["before"]


def test_clients_that_leave_take_their_requests_along(seen: Seen) -> None:
    assert seen["leaving"]["running"] == 0
    assert seen["leaving"]["after"] == seen["changes"]["before"]


def test_requests_are_counted_by_steering(seen: Seen) -> None:
    counters = seen["counters"]

    def count(steering: str, result: str) -> float:
        return float(counters.get(f'steer_requests_total{{result="{result}",steering="{steering}"}}', 0))

    assert count("add", "served") >= 8 and count("none", "served") >= 4 and count("off", "served") == 1
    assert count("other", "refused") == 1, "beyond the limit"
    assert count("unknown", "refused") >= 8 and count("broken", "refused") == 1


def test_the_doctor_finds_a_running_server_well(seen: Seen) -> None:
    doctor = seen["doctor"]
    assert doctor["status"] == 0, doctor
    told = json.loads(doctor["out"])["server"]
    assert told["passed"] and told["change"] > 1e-3 > told["noise"]
    assert not any(key in doctor["out"] + doctor["err"] for key in served.KEYS.values())


def test_at_sigterm_replies_are_finished_and_nothing_new_is_let_in(seen: Seen) -> None:
    found = seen["end"]
    assert found["texts"] == [found["whole"]] * 4
    assert found["late"] not in ("200",)
    assert found["status"] == 0
