"""`--engine KEY=VALUE`: read as YAML, for vLLM only, nothing twice and nothing that the verb says itself."""

from __future__ import annotations

import pytest

from steer.cli.engine import engine_options
from steer.errors import SteerError


def test_values_are_yaml_and_keys_take_both_dashes():
    given = [
        "tensor-parallel-size=8",
        "--max_model_len=4096",
        "enable_prefix_caching=false",
        "swap=",
        "load_format=auto",
    ]
    assert engine_options(given, runs=True) == {
        "tensor_parallel_size": 8,
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "swap": None,
        "load_format": "auto",
    }
    assert engine_options(None, runs=False) == {}


@pytest.mark.parametrize(
    ("given", "runs", "said"),
    [
        (["tensor_parallel_size=8"], False, "does not run in vLLM; expected vllm: before it"),
        (["tensor_parallel_size"], True, "KEY=VALUE"),
        (["a=1", "a=2"], True, "each key once"),
        (["model=x"], True, "Leave model to it"),
        (["max-num-seqs=4"], True, "Leave max_num_seqs to it"),
        (["additional_config={}"], True, "Leave additional_config to it"),
        (["a=[1"], True, "cannot be read"),
    ],
)
def test_what_would_not_act_is_refused(given, runs, said):
    with pytest.raises(SteerError, match=said):
        engine_options(given, runs, own=("max_num_seqs",))
