"""Compiled models are refused: torch.compile silently ignores hooks that are added later."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Direction, SteerError, Steering


def add(model):
    return model.steered(Steering((Add(Direction(torch.ones(1, 48), (1,), "resid_post"), "resid_post"),)))


def test_a_compiled_model_is_refused(tiny):
    hf, tokenizer = tiny("llama")
    with pytest.raises(SteerError, match=r"(?i)the model is compiled.*disable_compile=True"):
        steer.wrap(torch.compile(hf, backend="eager"), tokenizer, name="compiled")


def test_a_model_compiled_in_place_after_wrapping_is_refused(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    hf.compile(backend="eager")
    with pytest.raises(SteerError, match="compiled"), add(model):
        pass


def test_a_compiled_layer_is_refused_by_name(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    hf.model.layers[2].mlp = torch.compile(hf.model.layers[2].mlp, backend="eager")
    with pytest.raises(SteerError, match=r"The module model\.layers\.2\.mlp is compiled"), add(model):
        pass


def test_a_generate_that_compiles_inside_the_context_is_refused(tiny):
    """Hugging Face's generate compiles by itself for static caches on a GPU, and forced to on a CPU."""
    from transformers import CompileConfig

    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    ids = torch.tensor([[3, 14, 15]])
    with pytest.raises(SteerError, match="disable_compile=True"), add(model):
        hf.generate(ids, compile_config=config, **options)
    hf._compiled_call = None
    with add(model) as report:
        hf.generate(ids, compile_config=config, disable_compile=True, **options)
    assert report.touched[1, "resid_post"] == {"all": 6}
