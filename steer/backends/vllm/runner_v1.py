"""vLLM's first model runner: a step's rows are told right before its forward."""

from __future__ import annotations

from typing import Any

from steer.backends.vllm.rows import Rows, Span
from steer.errors import SteerError


def follow(runner: Any, rows: Rows) -> None:
    """Tell `rows` of every step of a `GPUModelRunner` (or `CPUModelRunner`).

    Raises:
        SteerError: the runner has no place where a forward begins.
    """
    original = getattr(runner, "_model_forward", None)
    if original is None:
        raise SteerError(f"vLLM's {type(runner).__name__} has no _model_forward", "the runner of a supported version")

    followed: dict[str, Any] = {}

    def _model_forward(*args: Any, **kwargs: Any) -> Any:
        spans = _spans(runner, rows, followed)
        tokens = sum(span.count for span in spans)
        rows.step(spans, runner.input_ids.gpu[:tokens])
        output = original(*args, **kwargs)
        rows.ran(spans)
        return output

    runner._model_forward = _model_forward


def _spans(runner: Any, rows: Rows, followed: dict[str, Any]) -> list[Span]:
    """Return where the step's requests are; take in what is new, also under an id that another had a step before."""
    batch, starts = runner.input_batch, runner.query_start_loc.np
    for request_id in followed.keys() - runner.requests.keys():
        rows.remove(request_id)
        del followed[request_id]
    spans = []
    for index, request_id in enumerate(batch.req_ids):
        state = runner.requests[request_id]
        if followed.get(request_id) is not state:
            extra = None if state.sampling_params is None else state.sampling_params.extra_args
            rows.add(request_id, extra, _known(state))
            followed[request_id] = state
        start, end = int(starts[index]), int(starts[index + 1])
        spans.append(Span(request_id, start, end - start, int(batch.num_computed_tokens_cpu[index])))
    return spans


def _known(state: Any) -> Any:
    return lambda: [*(state.prompt_token_ids or ()), *state.output_token_ids]
