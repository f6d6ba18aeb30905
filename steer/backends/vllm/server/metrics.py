"""Counters per steering, in the registry that vLLM shows under `/metrics`, with several API servers too.

    steer_requests_total{steering="shorter", result="served"}

`steering` is a name of the folder, `none`, `off`, or `unknown` for whatever else was asked for, so that clients cannot
make new rows. `result` is `served`, `refused` (by us, before vLLM saw it) or `failed` (vLLM answered with an error).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Literal

Result = Literal["served", "refused", "failed"]
Count = Callable[[str, Result], None]


@cache
def counter() -> Count:
    """Return the function that counts one request; one counter a process, since a registry takes a name once.

    Raises:
        ModuleNotFoundError: prometheus_client is not installed; vLLM brings it along.
    """
    prometheus = import_module("prometheus_client")
    requests = prometheus.Counter(
        "steer_requests", "Requests by steering and by what became of them.", ("steering", "result")
    )

    def count(steering: str, result: Result) -> None:
        requests.labels(steering, result).inc()

    return count
