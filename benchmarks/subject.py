"""What is measured: SmolLM2-135M from a folder or a GGUF file, or a random model of its shape, which costs the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import steer
from steer.model import SteerableModel

SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
BUNDLED = Path(__file__).parents[1] / "steer" / "builtin" / "chain"


def arguments(doc: str | None, pairs: int = 15) -> argparse.Namespace:
    """Read the options that every benchmark of a model has."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", help="folder, hub id or .gguf; a random model of SmolLM2-135M's shape without it")
    parser.add_argument("--pairs", type=int, default=pairs, help="interleaved rounds")
    parser.add_argument("--alone", action="store_true", help="leave other libraries out")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is the steadiest on a shared machine")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


def model_of(name: str | None) -> SteerableModel:
    """Return the model, float32, in evaluation mode."""
    return random_model() if name is None else steer.load(name, dtype=torch.float32)


def random_model(**changes: int) -> SteerableModel:
    """Return a random model of SmolLM2-135M's shape, or of that shape with changes."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE.to_dict(), **changes})
    hf = LlamaForCausalLM(config).float().eval()
    return steer.wrap(hf, AutoTokenizer.from_pretrained(BUNDLED), name="random, shape of SmolLM2-135M")


def random_ids(model: SteerableModel, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return token ids that are no special tokens, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(
        min(100, model.anatomy.vocab // 2), model.anatomy.vocab, (rows, length), generator=generator
    ).tolist()
    return found
