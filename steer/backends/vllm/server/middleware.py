"""The ASGI middleware that vLLM is given: every request passes here before vLLM sees it.

| request | what happens |
|---|---|
| POST /v1/chat/completions, /v1/completions | decided, rewritten, handed on; the reply says what it was steered by |
| GET /steerings | answered here |
| GET /health | 503 where steering lacks something; else vLLM's own |
| POST /tokenize, /detokenize and what the settings list | handed on, where they ask for no steering |
| any other POST, PUT, PATCH, DELETE; WebSockets | refused: they would run unsteered |
| any other GET | handed on |

Where keys are asked for, only what `OPEN` lists does without.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from steer.backends.vllm.server.asking import Prompt, RequestError, Served
from steer.backends.vllm.server.bodies import (
    DisconnectedError,
    Message,
    Receive,
    Scope,
    Send,
    collect,
    read_json,
    replay,
    too_large,
    with_member,
)
from steer.backends.vllm.server.front import Front, Started
from steer.backends.vllm.server.metrics import Count, counter

T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Awaitable[None]]
STEERED: dict[str, Prompt] = {"/v1/chat/completions": "chat", "/v1/completions": "raw"}
HARMLESS = ("/tokenize", "/detokenize")
OPEN = ("/health", "/ping", "/metrics", "/version", "/load")
"""Paths that need no key, as in vLLM."""
THREADS = 4
KINDS = {400: "BadRequestError", 401: "Unauthorized", 403: "Forbidden", 404: "NotFoundError"}
OTHER = "ServiceUnavailableError"


class SteeringMiddleware:
    """Decides, rewrites and hands on; see the module.

    Args:
        app: what vLLM made.
        front: what decides; as `steer serve` left it in the environment if not given.
        count: counts requests; in vLLM's `/metrics` if not given.

    Raises:
        SteerError: as `Front` and `Started.from_environment`.
    """

    def __init__(self, app: App, front: Front | None = None, count: Count | None = None) -> None:
        self.app = app
        self.front = Front(Started.from_environment()) if front is None else front
        self.count = counter() if count is None else count
        # Of its own: the event loop's is closed while the last replies are still being written.
        self._files = ThreadPoolExecutor(THREADS, "steerings")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI 3 has it."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "this server steers no WebSockets"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._route(scope, receive, send)
        except RequestError as refusal:
            if _path(scope) in STEERED:
                self.count(refusal.name, "refused")
            await _refuse(refusal, send)
        except DisconnectedError:
            return

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _path(scope), scope["method"]
        if method == "OPTIONS":
            return await self.app(scope, receive, send)
        key = None if path in OPEN else self.front.key(_header(scope, b"authorization"))
        if path in STEERED and method == "POST":
            body = await self._body(scope, receive)
            served, changed = await self._away(partial(self.front.admit, body, key, STEERED[path]))
            return await self._hand_on(scope, changed, receive, _Reply(send, served, self.count))
        if path == "/steerings" and method == "GET":
            return await _answer(await self._away(partial(self.front.listing, key)), send)
        if path == "/health" and method == "GET":
            lacking = await self._away(self.front.health)
            if lacking:
                raise RequestError(503, lacking)
        elif method == "POST" and path in (*HARMLESS, *self.front.settings().endpoints):
            body = await self._body(scope, receive)
            self.front.check_plain(body, path)
            return await self._hand_on(scope, body, receive, send)
        elif method not in ("GET", "HEAD") and path not in OPEN:
            remedy = "The operator can list it under endpoints of the settings, where nothing is steered"
            raise RequestError(404, f"{method} {path} would run unsteered", f"one of {', '.join(STEERED)}", remedy)
        return await self.app(scope, receive, send)

    async def _away(self, action: Callable[[], T]) -> T:
        """Do what reads files in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._files, action)

    async def _body(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        most = self.front.settings().body_bytes
        length = _header(scope, b"content-length") or ""
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            raise too_large(most)
        return read_json(await collect(receive, most))

    async def _hand_on(self, scope: Scope, body: dict[str, Any], receive: Receive, send: Send) -> None:
        data = json.dumps(body).encode()
        await self.app({**scope, "headers": _sized(scope["headers"], len(data))}, replay(data, receive), send)


class _Reply:
    """A `send` that says in the reply what it was steered by: in headers, and in the object of a JSON reply."""

    def __init__(self, send: Send, served: Served, count: Count) -> None:
        self._send, self._served, self._count = send, served, count
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            good = message["status"] < 400
            self._count(self._served.name, "served" if good else "failed")
            if good:
                message = {**message, "headers": [*message.get("headers", ()), *self._served.headers]}
                if _is_json(message["headers"]):
                    self._start = message
                    return
        elif message["type"] == "http.response.body" and self._start is not None:
            self._parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            data = with_member(b"".join(self._parts), "steering", self._served.told())
            await self._send({**self._start, "headers": _sized(self._start["headers"], len(data))})
            message, self._start = {"type": "http.response.body", "body": data, "more_body": False}, None
        await self._send(message)


async def _answer(value: dict[str, Any], send: Send, status: int = 200) -> None:
    data = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def _refuse(refusal: RequestError, send: Send) -> None:
    kind = KINDS.get(refusal.status, OTHER if refusal.status >= 500 else KINDS[400])
    error = {"message": str(refusal), "type": kind, "param": None, "code": refusal.status}
    await _answer({"error": error}, send, refusal.status)


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _header(scope: Scope, name: bytes) -> str | None:
    values = [value for key, value in scope["headers"] if key.lower() == name]
    return values[-1].decode("latin-1") if values else None


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    kinds = {key.lower(): value for key, value in headers}
    kind = kinds.get(b"content-type", b"").split(b";")[0].strip().lower()
    return kind == b"application/json" and b"content-encoding" not in kinds


def _sized(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(key, value) for key, value in headers if key.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]
