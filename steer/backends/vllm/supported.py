"""What an engine may be configured to do beside steering; everything else is refused at start, by name."""

from __future__ import annotations

from typing import Any

from steer.backends.vllm.config import Declared
from steer.backends.vllm.versions import check_version
from steer.errors import SteerError


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
        raise SteerError(f"the engine uses {found}, and steering does not support it", "", remedy)


def _unsupported(config: Any, parallel: Any, declared: Declared) -> list[tuple[str, str]]:
    passes = getattr(config.compilation_config, "pass_config", None)
    experts = any(kind in ("scale", "bias") for _, kind, _ in declared.places)
    checks = [
        (getattr(passes, "enable_sp", False), "the sequence-parallel pass (enable_sp)", "Leave enable_sp out"),
        (getattr(parallel, "enable_dbo", False), "dual batch overlap (DBO)", "Leave --enable-dbo out"),
        (getattr(parallel, "use_ubatching", False), "micro-batches", "Leave --ubatch-size out"),
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "decode context parallelism", "Use tensor parallelism"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism", "Use tensor parallelism"),
        (config.kv_transfer_config is not None, "a connector to external key-value caches", "Its keys do not know steerings: leave --kv-transfer-config out"),
        (experts and parallel.data_parallel_size > 1 and parallel.enable_expert_parallel, "data and expert parallelism together, under which a token's experts lie in another process", "Leave --enable-expert-parallel out, or steer no experts"),
        (getattr(config.cache_config, "kv_sharing_fast_prefill", False), "fast prefill with shared caches", "Leave it out"),
    ]  # fmt: skip
    return [(found, remedy) for holds, found, remedy in checks if holds]
