"""Prefix caches: blocks of steered requests have keys of their own, from the first steered token on.

A block that lies before it is shared with everybody. Where a phase but `all` takes part, the blocks that reach the prompt's
last token also say how long the prompt was and where its marks count: the same tokens are steered differently in a prompt
that goes on.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from steer.backends.vllm.library import Library
from steer.backends.vllm.request import KEY, Request

NAME = "generate_block_hash_extra_keys"


def extra_key(library: Library, request: Request, start: int, end: int) -> tuple[str, str] | None:
    """Return what tells the block of tokens [start, end) from one that was steered otherwise; None where none was."""
    lowered = library.lowered(request)
    last = request.prompt_length - 1
    if end <= last and not lowered.first_is_prompt:
        return None
    if end > last and lowered.positional:
        return KEY, f"{request.fingerprint}:{request.prompt_length}:{request.marks_from}"
    return KEY, request.fingerprint


def install(library: Library) -> None:
    """Let vLLM's block hashes know steerings, wherever the function was imported to."""
    from vllm.v1.core import kv_cache_utils

    original = getattr(kv_cache_utils, NAME)

    @wraps(original)
    def generate(request: Any, start: int, end: int, *rest: Any, **named: Any) -> Any:
        keys, *more = original(request, start, end, *rest, **named)
        params = request.sampling_params
        plain = None if params is None or params.extra_args is None else params.extra_args.get(KEY)
        own = None if plain is None else extra_key(library, Request.from_dict(plain), start, end)
        return (keys if own is None else (*(keys or ()), own), *more)

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, NAME, None) is original:
            setattr(module, NAME, generate)
