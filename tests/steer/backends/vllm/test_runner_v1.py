"""What vLLM's first runner tells of its steps, on a stand-in with the attributes that are read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from steer.backends.vllm import runner_v1
from steer.backends.vllm.library import Library
from steer.backends.vllm.request import Request, effective
from steer.backends.vllm.rows import Rows
from steer.backends.vllm.tables import Tables
from tests.steer.backends.vllm.made import declared, steerings, stored


class Runner:
    """One request a step, from its first token on."""

    def __init__(self) -> None:
        self.requests: dict[str, SimpleNamespace] = {}
        self.input_ids = SimpleNamespace(gpu=torch.full((8,), 5))
        self.query_start_loc = SimpleNamespace(np=np.array([0, 2]))

    def run(self, name: str, state: SimpleNamespace) -> None:
        self.requests[name] = state
        self.input_batch = SimpleNamespace(req_ids=[name], num_computed_tokens_cpu=np.array([0]))
        self._model_forward()

    def _model_forward(self) -> None:
        pass


def state(args: dict | None) -> SimpleNamespace:
    params = SimpleNamespace(extra_args=args)
    return SimpleNamespace(sampling_params=params, prompt_token_ids=[5, 5], output_token_ids=[])


def test_a_request_that_comes_under_an_id_that_was_just_aborted_is_another(tmp_path):
    bases = stored(tmp_path)
    engine = declared(tmp_path)
    tables = Tables(engine, engine.places, 8, torch.device("cpu"))
    runner, rows = Runner(), Rows(Library(engine), tables, 4)
    runner_v1.follow(runner, rows)

    def steered(name: str) -> SimpleNamespace:
        acting = effective(steerings()[name], 1.0, None)
        return state({"steering": Request(acting.fingerprint, bases[name], name, 1.0, None, 2, 0, True, False).to_dict()})  # fmt: skip

    runner.run("a", steered("all"))
    first = tables.slot[:2].tolist()
    runner.run("a", steered("project"))
    assert 0 not in (second := tables.slot[:2].tolist()) and first != second
    runner.run("a", state(None))
    assert tables.slot[:2].tolist() == [0, 0]
    runner.requests.clear()
    runner.run("b", steered("all"))
    assert tables.slot[:2].tolist() == first
