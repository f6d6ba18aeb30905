"""What an engine may be configured to do beside steering; everything else is refused at start, by name."""

from __future__ import annotations

from typing import Any

from steer.backends.vllm.config import Declared
from steer.backends.vllm.versions import check_version
from steer.errors import SteerError

WORKERS = tuple(
    f"vllm.v1.worker.{name}" for name in ("gpu_worker.Worker", "cpu_worker.CPUWorker", "xpu_worker.XPUWorker")
)
"""Workers whose `load_model` the plugin follows; another would load a model that nobody steers."""


def check_config(config: Any, declared: Declared) -> None:
    """Refuse a `VllmConfig` under which a token's row is not where the tables have it, or a cache is not kept apart.

    Raises:
        SteerError: what was found, and what to leave out.
    """
    import vllm

    check_version(vllm.__version__)
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if scheduler.max_num_seqs > declared.slots:
        raise SteerError(
            f"up to {scheduler.max_num_seqs} requests run at once, and {declared.slots} slots were declared",
            "at least one slot per request, so that each may have its own steering",
            f"Start with --max-num-seqs {declared.slots}, or declare more slots",
        )
    for found, remedy in _unsupported(config, parallel, declared):
        raise SteerError(f"the engine uses {found}, and steering is not known to act under it", "", remedy)


def _unsupported(config: Any, parallel: Any, declared: Declared) -> list[tuple[str, str]]:
    passes, caches, model = config.compilation_config.pass_config, config.cache_config, config.model_config
    experts = any(kind in ("scale", "bias") for _, kind, _ in declared.places)
    checks = [
        (parallel.worker_cls not in WORKERS, f"the worker {parallel.worker_cls}", "Leave --worker-cls out"),
        (model.runner_type != "generate", f"the runner {model.runner_type!r}, which writes no text", "Leave --runner and --convert out"),
        (model.is_encoder_decoder, "a model with an encoder, whose tokens have no phase", "Use the HF back end"),
        (_get(config, "diffusion_config") is not None, "diffusion, which does not write from left to right", "Use the HF back end"),
        (_get(passes, "enable_sp") or _get(passes, "enable_sequence_parallelism"), "the sequence-parallel pass (enable_sp)", "Leave enable_sp out"),
        (_get(parallel, "enable_hc_sp"), "sequence parallelism of hyper-connections", "Leave --enable-hc-sp out"),
        (_get(parallel, "enable_dbo"), "dual batch overlap (DBO)", "Leave --enable-dbo out"),
        (_get(parallel, "use_ubatching"), "micro-batches", "Leave --ubatch-size out"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "Use tensor parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "Use tensor parallelism"),
        (_get(parallel, "enable_elastic_ep"), "elastic expert parallelism, which moves layers between processes", "Leave --enable-elastic-ep out"),
        (experts and parallel.data_parallel_size > 1, "data parallelism with steered experts, whose layers gather the tokens of all processes", "Start one engine per replica, or steer no experts"),
        (config.kv_transfer_config is not None or _get(caches, "kv_offloading_size"), "a store of keys and values outside (LMCache, offloading, a connector)", "Its keys do not know steerings: leave --kv-transfer-config and --kv-offloading-size out"),
        (_get(caches, "kv_sharing_fast_prefill"), "fast prefill with shared caches, under which layers skip tokens", "Leave --kv-sharing-fast-prefill out"),
    ]  # fmt: skip
    return [(found, remedy) for holds, found, remedy in checks if holds]


def _get(config: Any, name: str) -> Any:
    """An option that not every supported version has; None where it has not."""
    return getattr(config, name, None)
