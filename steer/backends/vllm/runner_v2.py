"""vLLM's second model runner: requests are told when they come and go, a step's rows when its inputs are ready.

`prepare_inputs` of the model's state runs before every forward, replayed graphs included. A preempted request leaves and
comes back with what it has written among its tokens; the prompt's length is in the request itself.
"""

from __future__ import annotations

from typing import Any

from steer.backends.vllm.rows import Rows, Span
from steer.errors import SteerError


def follow(runner: Any, rows: Rows) -> None:
    """Tell `rows` of every request and step of a runner of `vllm.v1.worker.gpu`.

    Raises:
        SteerError: the model's state has no such methods.
    """
    state = runner.model_state
    missing = [name for name in ("add_request", "remove_request", "prepare_inputs") if not hasattr(state, name)]
    if missing:
        raise SteerError(f"vLLM's {type(state).__name__} has no {missing[0]}", "the runner of a supported version")
    latest: list[Span] = []
    added, removed, prepared, executed = state.add_request, state.remove_request, state.prepare_inputs, runner.execute_model  # fmt: skip

    def add_request(index: int, data: Any) -> Any:
        extra = None if data.sampling_params is None else data.sampling_params.extra_args
        tokens = tuple(data.prefill_token_ids or ())
        rows.add(data.req_id, extra, lambda: tokens)
        return added(index, data)

    def remove_request(request_id: str) -> Any:
        rows.remove(request_id)
        return removed(request_id)

    def prepare_inputs(batch: Any, states: Any) -> Any:
        starts, positions = batch.query_start_loc_np, batch.num_computed_tokens_np
        spans = [
            Span(name, int(starts[i]), int(starts[i + 1] - starts[i]), int(positions[i]))
            for i, name in enumerate(batch.req_ids)
        ]
        rows.step(spans, batch.input_ids)
        latest[:] = spans
        return prepared(batch, states)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        latest.clear()
        output = executed(*args, **kwargs)
        rows.ran(latest)
        return output

    state.add_request, state.remove_request, state.prepare_inputs = add_request, remove_request, prepare_inputs
    if rows.captured is not None:
        runner.execute_model = execute_model
