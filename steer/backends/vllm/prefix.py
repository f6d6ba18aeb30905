"""Prefix caches: blocks of steered requests have keys of their own, from the first steered token on.

A block that lies before it is shared with everybody. Where a phase but `all` takes part, the blocks that reach the prompt's
last token also say how long the prompt was and where its marks count: the same tokens are steered differently in a prompt
that goes on.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from steer.backends.vllm.request import KEY, Request

NAME = "generate_block_hash_extra_keys"
_installed: Any = None


def extra_key(request: Request, end: int) -> tuple[str, str] | None:
    """Return what tells the block of tokens that ends before `end` from one that was steered otherwise; None where none was."""  # fmt: skip
    last = request.prompt_length - 1
    if end <= last and not request.in_prompt:
        return None
    if end > last and request.positional:
        return KEY, f"{request.fingerprint}:{request.prompt_length}:{request.marks_from}"
    return KEY, request.fingerprint


def install() -> None:
    """Let vLLM's block hashes know steerings, wherever the function was imported to; once per process.

    A process may have several engines, one after the other or at once, so what the keys need is in the request itself.
    """
    global _installed
    from vllm.v1.core import kv_cache_utils

    original = getattr(kv_cache_utils, NAME)
    if original is _installed:
        return

    @wraps(original)
    def generate(request: Any, start: int, end: int, *rest: Any, **named: Any) -> Any:
        keys, *more = original(request, start, end, *rest, **named)
        params = request.sampling_params
        plain = None if params is None or params.extra_args is None else params.extra_args.get(KEY)
        own = None if plain is None else extra_key(Request.from_dict(plain), end)
        return (keys if own is None else (*(keys or ()), own), *more)

    _installed = generate
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, NAME, None) is original:
            setattr(module, NAME, generate)
