from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.backends.vllm import request
from steer.backends.vllm.server.front import VARIABLE, Front, Started
from steer.backends.vllm.server.middleware import SteeringMiddleware
from tests.steer.backends.vllm.server.serving import CHAT, FOLDER, Client, Engine, adapter, adding, front
from tests.steer.made import refused

COMPLETIONS = "/v1/completions"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    (tmp_path / "steerings").mkdir()
    adding(0).save(tmp_path / "steerings" / "calm.yaml")
    adding(0, (2,)).save(tmp_path / "steerings" / "far.yaml")
    return Client(front(tmp_path))


def arguments(client: Client) -> request.Asked | None:
    return request.asked(client.engine.bodies[-1].get("vllm_xargs"))


def settle(client: Client, root: Path, **document: Any) -> None:
    """Give the server of `client` a settings file."""
    (root / "settings.yaml").write_text(yaml.safe_dump(document))
    client.front = front(root)


def test_a_reply_says_what_it_was_steered_by_and_keeps_every_byte(client: Client) -> None:
    reply = client.steered("calm", coefficient=0.5, phase="generated")
    told = {"steering": "calm", "fingerprint": adding(0).fingerprint, "coefficient": 0.5, "phase": "generated"}
    assert reply.status == 200 and reply.json["steering"] == told
    assert reply.body.startswith(b'{"id": 1, "x": 0.1000,"steering": {')
    assert reply.headers["x-steering"] == "calm" and reply.headers["x-steering-coefficient"] == "0.5"
    assert (
        reply.headers["x-steering-fingerprint"] == told["fingerprint"]
        and reply.headers["x-steering-phase"] == "generated"
    )
    assert reply.headers["x-other"] == "kept" and int(reply.headers["content-length"]) == len(reply.body)
    assert arguments(client) == request.Asked("calm", adding(0).fingerprint, 0.5, "generated", "chat")
    assert client.front.store.get(adding(0).fingerprint).fingerprint == adding(0).fingerprint
    client.steered("calm", COMPLETIONS)
    assert arguments(client) == request.Asked("calm", adding(0).fingerprint, 1.0, None, "raw")
    assert client.counts == {("calm", "served"): 2}


def test_an_unsteered_reply_says_so(client: Client) -> None:
    reply = client.ask({"model": "chain", "n": 1})
    assert reply.headers["x-steering"] == "none" and reply.json["steering"] == {"steering": "none"}
    assert client.engine.bodies == [{"model": "chain", "n": 1}] and client.counts == {("none", "served"): 1}


def test_a_stream_goes_through_as_it_comes_with_headers(client: Client) -> None:
    client.engine = Engine(kind=b"text/event-stream; charset=utf-8", parts=(b"data: {}\n\n", b"data: [DONE]\n\n"))
    reply = client.steered("calm")
    assert reply.headers["x-steering-fingerprint"] == adding(0).fingerprint
    assert [part.get("body") for part in client.sent[1:]] == [b"data: {}\n\n", b"data: [DONE]\n\n"]


def test_what_vllm_refuses_is_not_said_to_be_steered(client: Client) -> None:
    client.engine = Engine(status=400, parts=(b'{"error": {}}',))
    reply = client.steered("calm")
    assert reply.status == 400 and reply.body == b'{"error": {}}'
    assert not [name for name in reply.headers if name.startswith("x-steering")]
    assert client.counts == {("calm", "failed"): 1}


@pytest.mark.parametrize("parts", [(b"",), (b"[1]",), (b"{}",), (b"{ }\n",), (b'{"a": "}"}',)])
def test_only_objects_get_a_member(client: Client, parts: tuple[bytes, ...]) -> None:
    client.engine = Engine(parts=parts)
    reply = client.steered("calm")
    if not parts[0].startswith(b"{"):
        assert reply.body == parts[0]
    else:
        assert {**json.loads(parts[0]), "steering": reply.json["steering"]} == reply.json


def test_unknown_names_get_the_list_and_one_row_in_the_counters(client: Client) -> None:
    for name in ("clam", "../calm", "a" * 5000, "x\r\nx-evil: 1"):
        reply = client.steered(name)
        assert reply.status == 400 and reply.json["error"]["code"] == 400 and "calm, far" in reply.message
    assert client.counts == {("unknown", "refused"): 4} and not client.engine.bodies


def test_what_needs_another_place_is_refused_before_vllm_sees_it(client: Client) -> None:
    assert "was not started for" in client.steered("far").message
    assert client.counts == {("far", "refused"): 1} and not client.engine.bodies
    rows = {row["name"]: row for row in client.get("/steerings").json["steerings"]}
    assert rows["calm"]["servable"] and not rows["far"]["servable"] and "layers 2" in rows["far"]["problem"]


def test_a_strength_that_float32_does_not_hold_is_refused_before_a_stream_has_begun(client: Client) -> None:
    reply = client.steered("calm", coefficient=1e200)
    assert reply.status == 400 and "beyond 1e+30" in reply.message


@pytest.mark.parametrize("more", [{"continue_final_message": True}, {"add_generation_prompt": False}])
def test_a_chat_without_a_turn_for_the_reply_has_no_place_from_which_marks_count(
    client: Client, more: dict[str, Any]
) -> None:
    for phase, path, status in (("thinking", CHAT, 400), ("thinking", COMPLETIONS, 200), ("generated", CHAT, 200)):
        body = {**more, "vllm_xargs": {"steering": "calm", "steering_phase": phase}}
        assert client.ask(body, path).status == status
        assert client.ask({**body, **dict.fromkeys(more)}, path).status == 200


def test_a_changed_file_is_another_fingerprint_and_the_store_keeps_both(client: Client, tmp_path: Path) -> None:
    client.steered("calm")
    path = adding(1).save(tmp_path / "steerings" / "calm.yaml", overwrite=True)
    assert client.steered("calm").headers["x-steering-fingerprint"] == adding(1).fingerprint
    assert client.front.store.get(adding(0).fingerprint).fingerprint == adding(0).fingerprint
    path.write_text("{")
    reply = client.steered("calm")
    assert reply.status == 400 and "not YAML" in reply.message, "never the old one"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000,
        b'{"a": ' * 5000, b'{"a": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(client: Client, data: bytes) -> None:
    reply = client.ask(data)
    assert reply.status == 400 and "JSON" in reply.message and not client.engine.bodies


def test_what_is_checked_is_what_vllm_reads_even_where_a_key_comes_twice(client: Client) -> None:
    client.ask(b'{"vllm_xargs": {"steering": "calm"}, "vllm_xargs": {}}')
    assert client.engine.bodies == [{}]
    client.ask(b'{"vllm_xargs": {}, "vllm_xargs": {"steering": "clam", "steering": "calm"}}')
    asked = arguments(client)
    assert asked is not None and asked.name == "calm"


def test_bodies_are_limited_whatever_they_say_about_their_length(client: Client, tmp_path: Path) -> None:
    settle(client, tmp_path, body_bytes=100)
    assert client.ask({"model": "chain"}).status == 200
    for given in ({}, {"length": 5}):
        reply = client.call("POST", CHAT, [b"x" * 60, b"x" * 60], **given)
        assert reply.status == 413 and "100" in reply.message
    assert len(client.engine.bodies) == 1


def test_a_body_may_come_in_pieces_and_a_client_may_leave(client: Client) -> None:
    data = json.dumps({"vllm_xargs": {"steering": "calm"}}).encode()
    assert client.call("POST", CHAT, [data[:5], data[5:9], data[9:]]).status == 200
    assert client.call("POST", CHAT, [data[:5]], leaves=True).status == 0


def test_that_a_client_left_reaches_vllm(client: Client) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"] for _ in range(2)])

    client.engine = app  # type: ignore[assignment]
    client.steered("calm")
    assert seen == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses", 404), ("POST", "/v1/chat/completions/", 404), ("POST", "/v1/messages", 404),
        ("POST", "/inference/v1/generate", 404), ("POST", "/invocations", 404), ("POST", "/v1/load_lora_adapter", 404),
        ("PUT", "/v1/completions", 404), ("DELETE", "/x", 404), ("POST", "/steerings", 404),
        ("GET", "/v1/models", 200), ("GET", "/metrics", 200), ("GET", "/health", 200), ("OPTIONS", CHAT, 200),
        ("HEAD", "/v1/models", 200), ("POST", "/tokenize", 200), ("GET", "/steerings", 200),
    ],
)  # fmt: skip
def test_what_would_run_unsteered_is_refused(client: Client, method: str, path: str, status: int) -> None:
    assert client.ask({}, path, method).status == status
    assert (client.engine.paths == [path]) == (status == 200 and path != "/steerings")


def test_the_operator_may_list_endpoints_and_these_steer_nothing(client: Client, tmp_path: Path) -> None:
    settle(client, tmp_path, endpoints=["/v1/embeddings"])
    assert client.ask({"input": "x"}, "/v1/embeddings").status == 200
    for words in ({"steering": "calm"}, {"steering": "calm", "steering_base": "f00"}):
        assert client.ask({"vllm_xargs": words}, "/v1/embeddings").status == 400
        assert client.ask({"vllm_xargs": words}, "/tokenize").status == 400


def test_a_root_path_is_no_part_of_the_endpoint(client: Client) -> None:
    assert client.call("POST", CHAT, [b"{}"], root="/api").status == 200
    assert client.call("GET", "/steerings", [b""], root="/api").json["model"] == "chain"


def test_websockets_are_closed_and_the_rest_of_asgi_goes_through(client: Client) -> None:
    sent: list[Any] = []
    passed: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    middleware = SteeringMiddleware(app, client.front, lambda steering, result: None)
    asyncio.run(middleware({"type": "websocket"}, receive, send))
    asyncio.run(middleware({"type": "lifespan"}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"] and passed == ["lifespan"]


@pytest.fixture
def guarded(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("A_KEY", "one")
    monkeypatch.setenv("B_KEY", "two")
    settle(client, tmp_path, keys=[{"env": "A_KEY", "allow": ["calm"]}, {"env": "B_KEY"}])
    return client


def test_keys_decide_what_may_be_asked_for_and_seen(guarded: Client) -> None:
    for path, method in ((CHAT, "POST"), ("/steerings", "GET"), ("/v1/models", "GET"), ("/docs", "GET")):
        for key in (None, "three"):
            assert guarded.ask({}, path, method, key=key).status == 401
    assert guarded.get("/health").status == guarded.get("/metrics").status == 200
    assert guarded.steered("calm", key="one").status == 200
    assert guarded.steered("far", key="one").status == guarded.steered("clam", key="one").status == 403
    assert "far" in guarded.steered("clam", key="two").message
    names = {
        key: [row["name"] for row in guarded.get("/steerings", key=key).json["steerings"]] for key in ("one", "two")
    }
    assert names == {"one": ["calm"], "two": ["calm", "far"]}


def test_no_secret_is_in_what_the_environment_or_a_reply_says(guarded: Client) -> None:
    texts = [guarded.front.started.to_text(), guarded.get("/steerings", key="two").body.decode()]
    texts += [guarded.steered("far", key="one").body.decode(), guarded.steered("calm").body.decode()]
    assert not any('"one"' in text or '"two"' in text or "Bearer one" in text for text in texts)


def test_the_switch_works_while_the_server_runs_and_a_damaged_file_stops_it(client: Client, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settle(client, tmp_path, default={"steering": "calm"})
    assert client.ask({}).headers["x-steering"] == "calm"
    settings.write_text("enabled: false")
    reply = client.steered("calm")
    assert (
        reply.status == 200 and reply.headers["x-steering"] == "off" and reply.json["steering"] == {"steering": "off"}
    )
    assert arguments(client) is None and client.get("/steerings").json["enabled"] is False
    settings.write_text("enabled: fasle")
    assert client.steered("calm").status == client.get("/health").status == client.get("/steerings").status == 503
    settings.unlink()
    assert client.ask({}).status == 503
    settings.write_text("{}")
    assert client.steered("calm").headers["x-steering"] == "calm" and client.get("/health").status == 200


def test_flags_count_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("{enabled: true, body_bytes: 7}")
    settings = front(tmp_path, enabled=False).settings()
    assert not settings.enabled and settings.body_bytes == 7


def test_health_is_that_of_the_default_too(client: Client, tmp_path: Path) -> None:
    settle(client, tmp_path, default={"steering": "gone"})
    reply = client.get("/health")
    assert reply.status == 503 and "gone" in reply.message and not client.engine.paths
    adding(0).save(tmp_path / "steerings" / "gone.yaml")
    assert client.get("/health").status == 200 and client.engine.paths == ["/health"]


def test_a_folder_that_is_gone_is_unhealthy_and_serves_no_steering(client: Client, tmp_path: Path) -> None:
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert client.get("/health").status == 503
    assert client.steered("calm").status == 503
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert client.get("/health").status == 200
    (tmp_path / "steerings").rename(tmp_path / "elsewhere")
    assert client.get("/health").status == client.get("/steerings").status == 503
    assert client.steered("calm").status == client.steered("nobody").status == 503


def test_adapters_are_served_by_name_and_refused_as_models(client: Client, tmp_path: Path) -> None:
    adapter(tmp_path / "steerings" / "tuned")
    entry = client.front.directory.find("tuned", 1 << 20)
    assert entry is not None
    client.front = front(tmp_path, adapters={"tuned": entry.fingerprint})
    reply = client.steered("tuned")
    assert (
        client.engine.bodies[-1] == {"model": "tuned"} and reply.headers["x-steering-fingerprint"] == entry.fingerprint
    )
    assert client.ask({"model": "tuned"}).status == 400
    assert client.steered("tuned", coefficient=0.5).status == 400
    settle(client, tmp_path, endpoints=["/v1/embeddings"])
    client.front = front(tmp_path, adapters={"tuned": entry.fingerprint})
    assert client.ask({"model": "tuned"}, "/v1/embeddings").status == 400
    assert client.ask({"model": "m"}, "/v1/embeddings").status == 200
    adapter(tmp_path / "steerings" / "late")
    assert "since the server was started" in client.steered("late").message


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    wide: Callable[..., Any] = adding
    made = front(tmp_path)
    steering = wide(0)
    from steer.interventions import Add
    from steer.steering import Steering
    from tests.steer.backends.vllm.server.serving import vector

    Steering((Add(vector(0, (1,), 7), "resid_post"),)).save(tmp_path / "steerings" / "narrow.yaml")
    steering.save(tmp_path / "steerings" / "calm.yaml")
    reply = Client(made).steered("narrow")
    assert reply.status == 400 and "shape" in reply.message


def test_it_is_started_by_steer_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    refused(lambda: SteeringMiddleware(Engine()), "steer serve")  # type: ignore[arg-type]
    started = front(tmp_path).started
    monkeypatch.setenv(VARIABLE, started.to_text())
    assert Started.from_environment() == started
    assert Front(Started.from_environment()).started.model == str(FOLDER)
    monkeypatch.setenv(VARIABLE, '{"model": 1, "more": 2}')
    refused(Started.from_environment, "more")
