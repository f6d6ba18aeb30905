"""Models, steerings and requests of the lane. Everything that takes time is made once and shared by all workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import steer
from steer.backends.vllm.widened import widen
from tests import tiny
from tests.vllm import cases
from tests.vllm.lab import Bench


@pytest.fixture(scope="session")
def bench(shared_folder: Callable[[str], Path]) -> Callable[[str], Bench]:
    """`bench("chain" | "chain-moe" | "qwen2")`: a model and the steerings of `cases`.

    The organisms' heads are of 16 numbers, and vLLM's kernels for processors begin at 32: these are their wider copies.
    """
    made: dict[str, Bench] = {}
    shared = shared_folder("vllm")

    def of(name: str) -> Bench:
        if name not in made:
            made[name] = cases.bench(shared, _folder(shared, name), name)
        return made[name]

    return of


def _folder(shared: Path, name: str) -> Path:
    folder = shared / "models" / name
    with FileLock(shared / f"{name}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            if name.startswith("chain"):
                widen(str(steer.load(f"organism:{name}").path), partial)
            else:
                model, tokenizer = tiny.build(
                    name, hidden_size=128, max_position_embeddings=512, tie_word_embeddings=False
                )  # Tied, a random model says its last token again with a probability of 1.
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            partial.rename(folder)
    return folder
