"""vLLM: any steering of this project per request, in an engine that nobody edited.

What runs where:

| process | does |
|---|---|
| front (LLM, API server) | resolves what a request asks for, checks that it fits: `engine`, `request`, `store` |
| engine core | checks again, keeps prefix caches apart: `engine`, `prefix` |
| worker | tables on the device, layers that look them up, phases per token: `tables`, `layers`, `routers`, `rows`, `tracker`, `runner_v1`, `runner_v2` |

A request's steering at its strength is a slot: rows in tables that exist before anything is compiled. Nothing of this is
active unless `additional_config["steering"]` asks for it. See `docs/serving.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from steer.backends.vllm.config import Declared as Declared
    from steer.backends.vllm.request import Request as Request
    from steer.backends.vllm.store import Store as Store

export(
    __name__,
    {
        "Declared": "steer.backends.vllm.config",
        "Request": "steer.backends.vllm.request",
        "Store": "steer.backends.vllm.store",
    },
)
