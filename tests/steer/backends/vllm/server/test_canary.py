from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from steer.backends.vllm.server import canary
from steer.cli import app
from tests.steer.made import refused


class Fake:
    """A server whose replies a test decides."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = [self.row("broken", servable=False), self.row("calm"), self.row("other")]
        self.enabled, self.moves, self.noise, self.key = True, 0.5, 0.0, ""
        self.lies, self.asked, self.plain = False, [], 0

    @staticmethod
    def row(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "servable": True, "fingerprint": f"of-{name}", "coefficients": None, **more}

    def reply(self, path: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, dict[str, str], Any]:
        if self.key and key != f"Bearer {self.key}":
            return 401, {}, {"error": "no key"}
        if path == "/steerings":
            return 200, {}, {"model": "m", "enabled": self.enabled, "steerings": self.rows}
        assert path == "/v1/completions" and body is not None
        words = body["vllm_xargs"]
        self.asked.append(words)
        steered = words["steering"] != "none"
        self.plain += not steered
        moved = self.moves if steered else self.noise * (self.plain - 1)
        headers = {"x-steering": words["steering"]}
        if steered:
            headers["x-steering-fingerprint"] = "of-another" if self.lies else f"of-{words['steering']}"
        logprobs = {"tokens": ["a", "b" if moved < 1 else "c"], "token_logprobs": [-0.5, -0.5 - moved]}
        return 200, headers, {"choices": [{"logprobs": logprobs}]}


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    made = Fake()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            status, headers, value = made.reply(self.path, body, self.headers.get("authorization"))
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_steering_that_changes_something_passes(fake: tuple[Fake, str]) -> None:
    server, url = fake
    found = canary.sing(f"{url}/v1/")
    assert found.passed and found.change == pytest.approx(0.5) and found.noise == 0 and not found.tokens_differ
    assert (found.model, found.steering, found.fingerprint, found.coefficient) == ("m", "calm", "of-calm", 1.0)
    plain, steered = {"steering": "none"}, {"steering": "calm", "steering_phase": "all", "steering_coefficient": 1.0}
    assert server.asked == [plain, plain, steered]
    server.moves = 2.0
    assert canary.sing(url, steering="other").tokens_differ


@pytest.mark.parametrize("fault", [{"moves": 0.0}, {"moves": 1e-9}, {"noise": 0.2}, {"lies": True}])
def test_one_that_does_nothing_or_is_not_said_fails(fake: tuple[Fake, str], fault: dict[str, Any]) -> None:
    server, url = fake
    vars(server).update(fault)
    assert not canary.sing(url).passed


def test_the_strength_lies_within_the_limits(fake: tuple[Fake, str]) -> None:
    server, url = fake
    server.rows = [Fake.row("fixed", coefficients=[0, 0]), Fake.row("weak", coefficients=[-1, 0.25])]
    found = canary.sing(url)
    assert (found.steering, found.coefficient) == ("weak", 0.25)


def test_what_cannot_be_asked_is_refused(fake: tuple[Fake, str]) -> None:
    server, url = fake
    refused(lambda: canary.sing(url, steering="broken"), "broken", "calm, other")
    server.rows = []
    refused(lambda: canary.sing(url), "no steering")
    server.enabled = False
    refused(lambda: canary.sing(url), "switched off")
    server.key = "s3cret"
    assert "s3cret" not in str(refused(lambda: canary.sing(url), "401", "--key-env"))
    refused(lambda: canary.sing("127.0.0.1:1"), "no address")
    refused(lambda: canary.sing("http://127.0.0.1:1"), "did not answer")


def test_what_is_no_server_of_pages_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 12)
                connection.sendall(b"220 another protocol\r\n")

        Thread(target=greet, daemon=True).start()
        refused(lambda: canary.sing(f"http://127.0.0.1:{listening.getsockname()[1]}"), "did not answer")


def test_the_verb_says_it_and_takes_the_key_from_the_environment(
    fake: tuple[Fake, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = fake
    server.key = "s3cret"
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert app.run(["doctor", "--server", url, "--key-env", "MY_KEY"]) == 0
    shown = capsys.readouterr()
    assert "Steering works" in shown.out and "calm" in shown.out and "s3cret" not in shown.out + shown.err
    server.moves = 0.0
    assert app.run(["doctor", "--server", url, "--key-env", "MY_KEY", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["server"]["passed"] is False
    assert app.run(["doctor", "--server", url]) == 2
    assert app.run(["doctor", "--steering", "calm"]) == 2
