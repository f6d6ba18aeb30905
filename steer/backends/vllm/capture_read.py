"""The caller's side of reading: finished traces as prompts of one more token, and what the workers kept of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from steer.backends.vllm.capture import KEY, ROUTER, Place, Taken, Wanted, joined
from steer.errors import SteerError


def read(
    llm: Any,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[Wanted],
    extra: Sequence[Mapping[str, Any]],
    adapter: Any = None,
) -> list[Taken]:
    """Put token sequences through an engine and return what was kept of each.

    Args:
        llm: `vllm.LLM`, started with `Declared.capture`.
        sequences: token ids, at least one each; one less than `max_model_len` at most.
        wanted: of each sequence.
        extra: of each sequence further `extra_args`, which ask for a steering under which it is read.
        adapter: vLLM's `LoRARequest` under which all are read; None for none.

    Raises:
        SteerError: the engine ended a sequence otherwise, or not every token was run; as a `ValueError` too, what it refuses.
    """
    from vllm import SamplingParams

    call = uuid4().hex
    keyed = [replace(each, key=f"{call}.{number}") for number, each in enumerate(wanted)]
    keys = [each.key for each in keyed]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={**more, KEY: each.to_dict()},
        )
        for each, more in zip(keyed, extra, strict=True)
    ]
    try:
        prompts = [{"prompt_token_ids": list(tokens)} for tokens in sequences]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
    finally:
        stages = llm.collective_rpc("steer_captured", args=(keys,))
    ended = {str(output.outputs[0].finish_reason) for output in outputs} - {"length", "stop"}
    if ended:
        raise SteerError(
            f"vLLM ended a trace that is read with {min(ended)!r}", "a trace that was run", "Its log says why"
        )
    return [joined([stage[each.key] for stage in stages if each.key in stage], each.length) for each in keyed]


def buffer_bytes(places: Sequence[Place], tokens: int, hidden: int, chosen: int, itemsize: int) -> int:
    """Return what the buffers of places need on the device.

    Args:
        places: that are read.
        tokens: most tokens of a step (`max_num_batched_tokens`).
        hidden, chosen: numbers of the model.
        itemsize: bytes of one number of the model's activations.
    """
    routers = sum(site == ROUTER for site, _ in places)
    return tokens * ((len(places) - routers) * hidden * itemsize + routers * chosen * 8)
