"""Generation with a vector added at every layer, against generation without.

DESIGN §7 row 2: target 1.00, the interval below 1.10. Beside us, each against its own plain generation: TransformerLens
and nnsight, where installed. The vectors are so short that the same tokens come out; what is measured is what it costs
to have them there. Greedy, a fixed number of tokens, one batch. With long vectors all libraries must write the same tokens,
others than without: else two different things would be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Work, below, compare, tell
from benchmarks.subject import arguments, model_of
from steer.directions import Direction
from steer.generation import Sampling
from steer.interventions import Add
from steer.model import SteerableModel
from steer.prompts import RawText
from steer.steering import Steering

ROWS, PROMPT, NEW = 8, 24, 24
SHORT, LONG = 1e-4, 20.0  # norms: one that changes no token, one that changes most
BAR = 1.10


def main() -> None:
    """Measure and print."""
    asked = arguments(__doc__)
    model = model_of(asked.model)
    model.hf.generation_config.eos_token_id = None
    text = prompt_text(model)
    works: dict[str, Work] = {
        "plain": ours(model, text),
        "steered": ours(model.with_(every_layer(model, SHORT)), text),
        "steered, phase generated": ours(model.with_(every_layer(model, SHORT, "generated")), text),
    }
    result = compare(works, "plain", pairs=asked.pairs)
    tokens = ROWS * NEW
    result |= {"model": model.name, "batch": [ROWS, PROMPT, NEW], "verdict": below(result["ratio"]["steered"], BAR)}
    result["tokens_per_second"] = tokens / result["seconds"]["plain"]
    if not asked.alone:
        result["others"] = {
            name: compare(pair, "plain", pairs=asked.pairs) for name, pair in others(model, text, SHORT).items()
        }
        result["same_tokens"] = same_tokens(model, text)
    tell("steered_generation", result)


def prompt_text(model: SteerableModel) -> str:
    """Return a prompt of about PROMPT tokens made of ordinary words of the vocabulary."""
    special = set(model.tokenizer.all_special_ids)
    known = [index for index in range(min(len(model.tokenizer), model.anatomy.vocab)) if index not in special]
    chosen = torch.randint(len(known), (PROMPT,), generator=torch.Generator().manual_seed(0))
    text: str = model.tokenizer.decode([known[index] for index in chosen.tolist()])
    return text


def ours(model: SteerableModel, text: str) -> Callable[[], list[list[int]]]:
    """Return our generation, under the changes of the view `model`."""

    def work() -> list[list[int]]:
        traces = model.generate([RawText(text)] * ROWS, sampling=Sampling(temperature=0.0, max_new_tokens=NEW))
        return [list(trace.completion_token_ids) for trace in traces]

    return work


def every_layer(model: SteerableModel, norm: float, phase: str = "all") -> Steering:
    """Return a random vector at `resid_post` of every layer."""
    layers = tuple(range(model.anatomy.layers))
    vectors = torch.randn(len(layers), model.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    vectors *= norm / vectors.norm(dim=-1, keepdim=True)
    return Steering((Add(Direction(vectors, layers, "resid_post", model.identity), "resid_post", phase=phase),))


def same_tokens(model: SteerableModel, text: str) -> dict[str, bool]:
    """Say of each library whether it writes what we write under long vectors, and whether that differs from plain."""
    plain, steered = ours(model, text)(), ours(model.with_(every_layer(model, LONG)), text)()
    found = {"steering changes tokens": plain != steered}
    for name, pair in others(model, text, LONG).items():
        found[name] = [as_new(pair["plain"]()), as_new(pair["steered"]())] == [plain, steered]
    return found


def as_new(tokens: object) -> list[list[int]]:
    """Return the new tokens of a library's output (row, prompt + new)."""
    assert isinstance(tokens, Tensor)
    rows: list[list[int]] = tokens[:, -NEW:].tolist()
    return rows


def others(model: SteerableModel, text: str, norm: float) -> dict[str, dict[str, Work]]:
    """Return plain and steered generation by other libraries."""
    ids = torch.tensor([model.render(text).token_ids] * ROWS)
    steering = every_layer(model, norm).interventions[0]
    assert isinstance(steering, Add)
    vectors = {layer: steering.direction[layer] for layer in steering.active_layers}
    found: dict[str, dict[str, Work]] = {}
    if find_spec("transformer_lens") is not None:
        found["transformer-lens"] = lens(model, vectors, ids)
    if find_spec("nnsight") is not None:
        found["nnsight"] = sight(model, vectors, ids)
    return found


def lens(model: SteerableModel, vectors: dict[int, Tensor], ids: Tensor) -> dict[str, Work]:
    """Return generation by a TransformerLens bridge around a copy of the model."""
    from steer.backends.transformer_lens import wrap

    bridge = wrap(model.hf).bridge

    def plain() -> object:
        return bridge.generate(ids, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False)

    def add(vector: Tensor) -> Callable[[Tensor, Any], Tensor]:
        return lambda value, hook: value + vector

    def steered() -> object:
        hooks = [(f"blocks.{layer}.hook_resid_post", add(vector)) for layer, vector in vectors.items()]
        with bridge.hooks(fwd_hooks=hooks):
            return plain()

    return {"plain": plain, "steered": steered}


def sight(model: SteerableModel, vectors: dict[int, Tensor], ids: Tensor) -> dict[str, Work]:
    """Return generation by nnsight around the model."""
    from nnsight import TransformersModel

    traced = TransformersModel(model.hf, tokenizer=model.tokenizer, task="text-generation")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": NEW, "do_sample": False}

    def plain() -> object:
        with traced.generate(inputs, **options) as tracer:
            tokens = tracer.result.save()
        return tokens  # noqa: RET504  (nnsight reads the block's source)

    def steered() -> object:
        with traced.generate(inputs, **options) as tracer:
            for _step in tracer.iter[0:NEW]:
                for layer, vector in vectors.items():
                    traced.model.layers[layer].output = traced.model.layers[layer].output + vector
            tokens = tracer.result.save()
        return tokens  # noqa: RET504

    return {"plain": plain, "steered": steered}


if __name__ == "__main__":
    main()
