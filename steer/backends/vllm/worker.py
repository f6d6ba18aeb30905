"""A worker: tables on its device, layers that look them up, and the step's rows, made right after the model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steer.backends.vllm import capture_layers, routers, runner_v1, runner_v2, selfcheck
from steer.backends.vllm import layers as in_layers
from steer.backends.vllm.capture_worker import Captured
from steer.backends.vllm.config import Declared
from steer.backends.vllm.library import Library
from steer.backends.vllm.rows import Rows
from steer.backends.vllm.supported import check_config
from steer.backends.vllm.tables import Tables

logger = logging.getLogger("vllm.steer")


def worker_classes() -> list[Any]:
    """Return the classes whose `load_model` makes a model."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker as GPUWorker

    return [GPUWorker, CPUWorker]


class Worker:
    """What steers one process's part of the model.

    Args:
        worker: vLLM's.
        declared: what the engine was started for.

    Raises:
        SteerError: the model, the runner or the configuration is not one that steering is known to act in.
    """

    def __init__(self, worker: Any, declared: Declared) -> None:
        config, runner = worker.vllm_config, worker.model_runner
        check_config(config, declared)
        self.model = model = runner.get_model()
        layers = in_layers.decoder_layers(model, declared)
        places = in_layers.local_places(declared, layers)
        self.tables = Tables(declared, places, _tokens(config), torch.device(runner.device))
        self.captured = _captured(worker, declared, layers)
        if self.captured is not None:
            capture_layers.before(layers, self.captured)
        in_layers.install(layers, self.tables)
        rerouted = routers.install(layers, self.tables)
        if self.captured is not None:
            capture_layers.after(layers, self.captured, declared)
        self.rows = Rows(Library(declared), self.tables, config.scheduler_config.max_num_seqs, self.captured)
        selfcheck.prove(worker, model, layers, self.tables, rerouted)
        follow = runner_v2.follow if hasattr(runner, "model_state") else runner_v1.follow
        follow(runner, self.rows)
        logger.info(
            "steering: %s, %d slots, %.1f MB of tables",
            _counted(places),
            declared.slots,
            self.tables.bytes / 1e6,
        )


def _captured(worker: Any, declared: Declared, layers: Mapping[int, Any]) -> Captured | None:
    """Return the buffers of what is read; on one process of those that share a layer, since all have the same rows."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    places = [place for place in declared.capture if place[1] in layers]
    if not places or get_tensor_model_parallel_rank():
        return None
    config = worker.vllm_config
    captured = Captured(
        places,
        tokens=_tokens(config),
        hidden=declared.hidden,
        experts=declared.experts,
        chosen=declared.chosen,
        dtype=config.model_config.dtype,
        device=worker.model_runner.device,
    )
    logger.info("steering: %d places are read, %.1f MB of buffers", len(places), captured.memory / 1e6)
    return captured


def _tokens(config: Any) -> int:
    """Rows of the largest step, padding included."""
    scheduler, compilation = config.scheduler_config, config.compilation_config
    sizes: Sequence[int] = compilation.cudagraph_capture_sizes or ()
    largest = max([int(size) for size in [scheduler.max_num_batched_tokens, scheduler.max_num_seqs, *sizes]])
    across = int(config.parallel_config.tensor_parallel_size)
    return -(-largest // across) * across


def _counted(places: Sequence[tuple[str, str, int]]) -> str:
    found: dict[tuple[str, str], int] = {}
    for site, kind, _ in places:
        found[site, kind] = found.get((site, kind), 0) + 1
    return ", ".join(f"{kind} at {site} of {count} layers" for (site, kind), count in found.items()) or "no places here"
