"""What the plugin's hooks do around vLLM's own methods."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from steer.backends.vllm import plugin, worker
from steer.errors import SteerError
from tests.steer.backends.vllm.made import declared


def test_a_model_that_is_loaded_over_a_steered_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "Worker", lambda own, told: SimpleNamespace(model=own.model_runner.get_model()))
    load = plugin._after_load(lambda own, model: setattr(own.model_runner, "get_model", lambda: model))
    told = SimpleNamespace(additional_config=declared(tmp_path).to_config())
    own, first = SimpleNamespace(vllm_config=told, model_runner=SimpleNamespace()), object()
    load(own, first)
    load(own, first)  # A class of workers whose load_model calls that of another.
    with pytest.raises(SteerError, match="second model, whose layers nobody steers"):
        load(own, object())
    plain = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}), model_runner=SimpleNamespace())
    load(plain, first)
    load(plain, object())
    assert not hasattr(plain, "steer")
