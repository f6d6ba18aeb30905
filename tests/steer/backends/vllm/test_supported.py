"""What an engine may be configured to do beside steering: everything else is refused at start, by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from steer.backends.vllm.supported import WORKERS, check_config
from steer.errors import SteerError
from tests.steer.backends.vllm import fakes


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(__version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def config(**changes: Any) -> Any:
    """A configuration as vLLM's, with `part__name=value` changed."""
    parts: dict[str, Any] = {
        "parallel_config": {"worker_cls": WORKERS[0], "enable_dbo": False, "use_ubatching": False, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 1},
        "scheduler_config": {"max_num_seqs": 2},
        "cache_config": {"kv_sharing_fast_prefill": False, "kv_offloading_size": None},
        "model_config": {"runner_type": "generate", "is_encoder_decoder": False},
        "pass_config": {"enable_sp": False},
    }  # fmt: skip
    top = {"kv_transfer_config": None}
    for name, value in changes.items():
        part, _, option = name.rpartition("__")
        (parts[f"{part}_config"] if part else top)[option] = value
    made = {name: SimpleNamespace(**options) for name, options in parts.items()}
    passes = made.pop("pass_config")
    return SimpleNamespace(**made, **top, compilation_config=SimpleNamespace(pass_config=passes))


DENSE = (("resid_post", "add", 1),)
ROUTED = (*DENSE, ("router", "scale", 1))


@pytest.mark.parametrize("worker", WORKERS)
def test_plain_engines_and_parallel_ones_are_let_through(worker: str) -> None:
    for places in (DENSE, ROUTED, ()):
        check_config(config(parallel__worker_cls=worker, parallel__tensor_parallel_size=4), fakes.tables_of(places).declared)  # fmt: skip
    check_config(config(parallel__data_parallel_size=2), fakes.tables_of(DENSE).declared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler__max_num_seqs": 3}, "up to 3 requests run at once, and 2 slots were declared"),
        ({"parallel__worker_cls": "mine.Worker"}, "the worker mine.Worker"),
        ({"model__runner_type": "pooling"}, "the runner 'pooling'"),
        ({"model__is_encoder_decoder": True}, "a model with an encoder"),
        ({"diffusion_config": object()}, "diffusion"),
        ({"pass__enable_sp": True}, "sequence-parallel pass"),
        ({"parallel__enable_hc_sp": True}, "hyper-connections"),
        ({"parallel__enable_dbo": True}, "dual batch overlap"),
        ({"parallel__use_ubatching": True}, "micro-batches"),
        ({"parallel__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"parallel__enable_elastic_ep": True}, "elastic expert parallelism"),
        ({"kv_transfer_config": object()}, "LMCache"),
        ({"cache__kv_offloading_size": 4.0}, "--kv-offloading-size"),
        ({"cache__kv_sharing_fast_prefill": True}, "fast prefill"),
    ],
)
def test_everything_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerError, match=f"(?i){message}"):
        check_config(config(**changes), fakes.tables_of(DENSE).declared)


def test_steered_experts_and_data_parallelism_do_not_go_together() -> None:
    with pytest.raises(SteerError, match="data parallelism with steered experts"):
        check_config(config(parallel__data_parallel_size=2), fakes.tables_of(ROUTED).declared)


def test_another_version_is_refused(vllm: SimpleNamespace) -> None:
    vllm.__version__ = "0.34.1"
    with pytest.raises(SteerError, match=r"this is vLLM 0\.34\.1|This is vLLM 0\.34\.1"):
        check_config(config(), fakes.tables_of(DENSE).declared)
