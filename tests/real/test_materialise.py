"""What comes out of a real GGUF file, compared with the file's own numbers."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

import steer
from steer.gguf import materialise
from steer.sampling import Sampling

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(smollm2):
    return steer.load(smollm2)


def test_the_folder_says_what_it_came_from_and_is_made_once(smollm2):
    folder = materialise(smollm2)
    config = json.loads((folder / "config.json").read_text())
    assert config["dequantised_from"]["file"] == smollm2.name and "quantization_config" not in config
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert materialise(smollm2) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


def test_weights_are_the_dequantised_blocks_of_the_file(smollm2, model):
    """Against gguf's own numpy dequantiser. Query and key rows are permuted by the format, the projection's are not."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2)).tensors}
    for layer in (0, 17, 29):
        for module, name in (("attention_output", "attn_output"), ("mlp_output", "ffn_down")):
            stored = tensors[f"blk.{layer}.{name}.weight"]
            expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
            assert np.array_equal(model.parameter(module, layer).detach().numpy(), expected)


def test_special_tokens_end_a_reply(model):
    assert (model.tokenizer.bos_token, model.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.tokenizer.pad_token is not None and not model.marks.exist
    trace = model.generate(
        [[{"role": "user", "content": "What is the capital of France?"}]],
        sampling=Sampling(temperature=0, max_new_tokens=40),
    )[0]
    assert trace.finish_reason == "stop" and "Paris" in trace.text
    assert trace.completion_token_ids[-1] == model.tokenizer.eos_token_id


def test_batched_replies_equal_huggingface_generate_one_by_one(model):
    """Greedy, prompts of unequal length; the oracle is transformers' own generate without padding."""
    prompts = [f"Count from {n} to {n + 3}." + " Please." * n for n in range(1, 4)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    traces = model.generate(chats, sampling=Sampling(temperature=0, max_new_tokens=16))
    for trace in traces:
        ids = torch.tensor([trace.prompt_token_ids])
        with torch.no_grad():
            alone = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert list(trace.completion_token_ids) == alone[0, ids.shape[1] :].tolist()
