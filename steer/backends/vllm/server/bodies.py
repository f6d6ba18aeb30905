"""Bytes of requests and replies: reading JSON that anybody may have sent, and adding to a JSON object that vLLM wrote."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from steer.backends.vllm.server.asking import RequestError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class DisconnectedError(Exception):
    """The client went away before the body was complete."""


def read_json(data: bytes) -> dict[str, Any]:
    """Read the body of a request.

    Raises:
        RequestError: 400, no JSON, NaN or an infinite number in it, nested too deeply, or no object.
    """
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise RequestError(400, f"the body of the request is no JSON ({reason})", "a JSON object") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body of the request is no JSON object", "a JSON object")
    return body


def with_member(data: bytes, name: str, value: Mapping[str, Any]) -> bytes:
    """Return a JSON object with one more member at its end; all that was there keeps its bytes.

    Anything that is no JSON object from brace to brace comes back as it is.
    """
    text = data.rstrip()
    if not text.startswith(b"{") or not text.endswith(b"}"):
        return data
    inside = text[:-1].rstrip()
    comma = b"" if inside == b"{" else b","
    return inside + comma + json.dumps({name: value}).encode()[1:]


async def collect(receive: Receive, most: int) -> bytes:
    """Read the body of a request.

    Raises:
        RequestError: 413, more than `most` bytes.
        DisconnectedError: the client went away.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise too_large(most)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def too_large(most: int) -> RequestError:
    """Return the refusal of a body that is too large."""
    return RequestError(413, f"the body of the request has more than {most} bytes", f"at most {most} on this server")


def replay(data: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `data` as the whole body, then what the client sends: that it went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    return again


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
