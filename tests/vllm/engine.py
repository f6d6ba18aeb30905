"""One engine of vLLM: `.venv-vllm/bin/python tests/vllm/engine.py JOB.json RESULT.json`. Imports nothing of ours.

A job is

    {"model": folder, "options": {…}, "interpreted": false, "rounds": [[{"prompt": [ids], "tokens": n, "extra": {…}}, …], …]}

`options` are those of `vllm.LLM`; every round is one batch, whose requests are added before any of them runs. `interpreted`
lets vLLM's second runner work without a GPU: Triton's interpreter runs its kernels. A result says for every request which
tokens were chosen, with what logarithms of probabilities, how many tokens of the prompt came from the cache; or the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def interpret() -> None:
    """Let Triton believe in a back end for processors, and run every kernel line by line."""
    os.environ["TRITON_INTERPRET"] = os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = type("Backend", (), {"driver": Driver, "compiler": None})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds in one engine."""
    from vllm import LLM

    start = time.monotonic()
    llm = LLM(model=job["model"], disable_log_stats=False, **job["options"])
    made = time.monotonic()
    rounds = [answer(llm, number, requests) for number, requests in enumerate(job["rounds"])]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {"rounds": rounds, "counters": counters, "made": made - start, "ran": time.monotonic() - made}


def answer(llm: Any, number: int, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run one batch; what vLLM refuses is an answer, too."""
    from vllm import SamplingParams

    found: dict[str, dict[str, Any]] = {}
    for index, request in enumerate(requests):
        name = f"{number}.{index}"
        params = SamplingParams(
            temperature=0,
            max_tokens=request["tokens"],
            logprobs=0,
            ignore_eos=True,
            extra_args=request["extra"] or None,
        )
        try:
            llm.llm_engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
        except ValueError as error:
            found[name] = {"error": str(error)}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = told(output)
    return [found[f"{number}.{index}"] for index in range(len(requests))]


def told(output: Any) -> dict[str, Any]:
    """Return what a finished request wrote."""
    reply = output.outputs[0]
    tokens = list(reply.token_ids)
    chosen = [at[token].logprob for at, token in zip(reply.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": chosen, "cached": output.num_cached_tokens, "reason": reply.finish_reason}


def main() -> None:
    """Read the job, run it, write the result."""
    source, target = (Path(name) for name in sys.argv[1:])
    job = json.loads(source.read_text())
    if job["interpreted"]:
        interpret()
    target.write_text(json.dumps(run(job)))


if __name__ == "__main__":  # The engine's other processes import this file again.
    main()
