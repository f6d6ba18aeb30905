"""A canary for a running server: is a steered reply another one than a plain one, and a plain one the same twice?

Standard library only: it asks over the network, as any client does, with greedy decoding and phase `all`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from steer.errors import SteerError

PROMPT = "1 + 1 ="
TOKENS = 8
SECONDS = 120
CLEARLY = 10.0
"""How many times the difference of two plain replies a steered one has to differ by."""
LEAST = 1e-6


@dataclass(frozen=True)
class ServerCanary:
    """What one steering of a server did.

    Attributes:
        url: of the server.
        model: as it calls its model.
        steering: which one was asked for.
        fingerprint: that the reply said.
        coefficient: that was asked for: 1, or what the limits allow next to it.
        change: max |steered − plain| over the logarithms of the probabilities of the tokens, up to the first other token.
        noise: the same of two plain replies; 0 unless batches change what a GPU rounds.
        tokens_differ: whether steering changed the greedy reply itself.
        said: whether both replies said correctly what they were steered by.
    """

    url: str
    model: str
    steering: str
    fingerprint: str
    coefficient: float
    change: float
    noise: float
    tokens_differ: bool
    said: bool

    @property
    def passed(self) -> bool:
        """Whether steering works there."""
        return self.said and self.change > max(CLEARLY * self.noise, LEAST)


def sing(url: str, key: str | None = None, steering: str | None = None) -> ServerCanary:
    """Ask a server for a plain reply twice and for a steered one.

    Args:
        url: such as http://127.0.0.1:8000.
        key: sent as a bearer token, where the server asks for one.
        steering: which one; None takes the first that can be served.

    Raises:
        SteerError: nobody answers, the server is no `steer serve`, steering is off, or nothing can be served.
    """
    url = url.rstrip("/").removesuffix("/v1")
    _, listed = _call(f"{url}/steerings", key)
    if not listed.get("enabled"):
        raise SteerError(
            f"steering is switched off at {url}", "a server that steers", "Set enabled: true in its settings"
        )
    row = _chosen(listed, steering, url)
    coefficient = _coefficient(row)
    words = {"steering": row["name"], "steering_phase": "all", "steering_coefficient": coefficient}
    plain = [_reply(url, key, listed["model"], {"steering": "none"}) for _ in range(2)]
    steered = _reply(url, key, listed["model"], words)
    noise, _ = _farthest(plain[0], plain[1])
    change, other = _farthest(plain[0], steered)
    told = steered[0]
    said = plain[0][0].get("x-steering") == "none" and told.get("x-steering") == row["name"]
    same = told.get("x-steering-fingerprint") == row["fingerprint"]
    fingerprint = told.get("x-steering-fingerprint", "")
    return ServerCanary(
        url, listed["model"], row["name"], fingerprint, coefficient, change, noise, other, said and same
    )


Reply = tuple[Mapping[str, str], list[str], list[float]]


def _chosen(listed: Mapping[str, Any], name: str | None, url: str) -> Mapping[str, Any]:
    rows: list[Mapping[str, Any]] = [row for row in listed["steerings"] if row["servable"]]
    usable = [row for row in rows if (row["name"] == name if name else _coefficient(row) != 0)]
    if not usable:
        raise SteerError(
            f"{url} can serve no steering {name!r}" if name else f"{url} has no steering that can be served",
            f"one of {', '.join(row['name'] for row in rows)}" if rows else "at least one",
            "GET /steerings says what is there and what is wrong with it",
        )
    return usable[0]


def _coefficient(row: Mapping[str, Any]) -> float:
    """1, or the next number within the limits."""
    least, most = row["coefficients"] or (-math.inf, math.inf)
    return float(min(max(1.0, least), most))


def _reply(url: str, key: str | None, model: str, words: Mapping[str, Any]) -> Reply:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    headers, found = _call(f"{url}/v1/completions", key, {**body, "vllm_xargs": dict(words)})
    logprobs = found["choices"][0]["logprobs"]
    return headers, logprobs["tokens"], logprobs["token_logprobs"]


def _farthest(one: Reply, other: Reply) -> tuple[float, bool]:
    """Largest difference up to the first token that differs, and whether one does."""
    farthest = 0.0
    for token, another, a, b in zip(one[1], other[1], one[2], other[2], strict=True):
        farthest = max(farthest, abs(a - b))
        if token != another:
            return farthest, True
    return farthest, False


def _call(url: str, key: str | None, body: Mapping[str, Any] | None = None) -> tuple[Mapping[str, str], Any]:
    if not url.startswith(("http://", "https://")):
        raise SteerError(f"{url!r} is no address of a server", "http://HOST:PORT")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=SECONDS) as reply:
            return {name.lower(): value for name, value in reply.headers.items()}, json.loads(reply.read())
    except HTTPError as error:
        said = error.read()[:400].decode("utf-8", "replace")
        remedy = "Name the variable with the key: --key-env" if error.code in (401, 403) else "Is it `steer serve`?"
        raise SteerError(
            f"{url} answered {error.code}: {said}", "a server that `steer serve` started", remedy
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise SteerError(f"{url} did not answer ({error})", "a server that `steer serve` started", "Check address and log") from None  # fmt: skip
