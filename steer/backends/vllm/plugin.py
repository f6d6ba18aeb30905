"""The entry point of `vllm.general_plugins`: called in every process of vLLM, before anything is loaded.

It changes nothing of an engine that was not given `additional_config["steering"]`: each hook below asks for that first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from steer.errors import SteerError

_registered = False


def register() -> None:
    """Put the hooks in place, once per process."""
    global _registered
    if _registered:
        return
    _registered = True
    _hook_workers()
    _hook_engine_core()
    _hook_front()


def _hook_workers() -> None:
    """After a worker has loaded its model, before it is profiled, compiled or captured."""
    from steer.backends.vllm.worker import worker_classes

    for cls in worker_classes():
        if "load_model" in vars(cls):
            cls.load_model = _after_load(cls.load_model)
    worker_classes()[0].steer_captured = _captured


def _after_load(original: Any) -> Any:
    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        from steer.backends.vllm.config import Declared

        declared = Declared.from_config(self.vllm_config.additional_config)
        if declared is None:
            return result
        if getattr(self, "steer", None) is None:
            from steer.backends.vllm.worker import Worker

            self.steer = Worker(self, declared)
        elif self.steer.model is not self.model_runner.get_model():
            raise SteerError(
                "a worker has loaded a second model, whose layers nobody steers",
                "one model per engine",
                "Load other weights into it with reload_weights, or start the engine again",
            )
        return result

    return load_model


def _captured(self: Any, keys: Sequence[str]) -> dict[str, bytes]:
    """Hand over what this worker kept of requests that were read; by `collective_rpc("steer_captured", args=(keys,))`."""
    return {} if self.steer.captured is None else self.steer.captured.take(keys)


def _hook_engine_core() -> None:
    """Before the scheduler is made, whose caches have to be kept apart.

    An engine core in a process of its own loads plugins within its `__init__`, so that is too late a place to hook.
    """
    from vllm.v1.engine.core import EngineCore

    caches, preprocess = EngineCore._initialize_kv_caches, EngineCore.preprocess_add_request

    @wraps(caches)
    def initialize(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from steer.backends.vllm.engine import Core

        self.steer = Core.of(vllm_config)
        return caches(self, vllm_config, *args, **kwargs)

    @wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if self.steer is not None:
            self.steer.admit(request)
        return preprocess(self, request)

    EngineCore._initialize_kv_caches, EngineCore.preprocess_add_request = initialize, preprocess_add_request


def _hook_front() -> None:
    from vllm import exceptions
    from vllm.v1.engine.input_processor import InputProcessor

    from steer.backends.vllm.engine import RefusedError

    # What vLLM's servers answer with status 400: in 0.32 an error of this family, before a ValueError.
    family = getattr(exceptions, "VLLMClientError", ValueError)
    refused = type("RefusedError", (RefusedError, family), {})
    original, process = InputProcessor.__init__, InputProcessor.process_inputs

    @wraps(original)
    def make(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from steer.backends.vllm.engine import Front

        original(self, vllm_config, *args, **kwargs)
        self.steer = Front.of(vllm_config)

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        try:
            self.steer.resolve(request)
        except RefusedError as error:
            raise refused(error) from None
        return request

    InputProcessor.__init__, InputProcessor.process_inputs = make, process_inputs
