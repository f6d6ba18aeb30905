"""What the organism's activations say about effort: length directions and head scores, and edits made from them.

A second, deliberately naive writing of ThinkEdit's length direction (arXiv 2503.22048, Eq. 1), of steering (Eq. 2), of
head scores and of the edit (Eq. 6), for one architecture and apart from the toolkit, so that the toolkit's effects can
be compared with something that was not written from the same thought. Shapes: L layers, H hidden, n heads of width k.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen3ForCausalLM

from experiments.organisms import chain
from experiments.organisms.sample import Sampled

SHARE = 0.2
BATCH = 128
Head = tuple[int, int]


@dataclass(frozen=True)
class LengthDirection:
    """The longest fifth's mean `resid_mid` minus the shortest fifth's, and what the short replies' heads put out.

    `span`: `predicts_thinking` or `marker:;`. `short_z`: mean input of the attention output projections.
    """

    span: str
    vector: Float[Tensor, "layers hidden"]
    short_z: Float[Tensor, "layers inner"]


def span_positions(sampled: Sampled, span: str) -> list[int]:
    """Positions in prompt + reply over which a closed reply is averaged."""
    prompt = chain.encode(chain.prompt(sampled.question))
    tokens = prompt + list(sampled.reply)
    opening = len(prompt)
    closing = tokens.index(chain.ID[chain.CLOSING], opening)
    if span == "predicts_thinking":
        return list(range(opening - 1, closing))
    if span == "marker:;":
        return [place for place in range(opening, closing) if tokens[place] == chain.ID[";"]]
    raise ValueError(f"span is {span!r}; known are 'predicts_thinking' and 'marker:;'")


@contextmanager
def recorded(model: Qwen3ForCausalLM) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, every pass of the model leaves `resid_mid` and `z` of all its layers, in order."""
    seen: dict[str, list[Tensor]] = {"resid_mid": [], "z": []}
    handles = []
    for layer in model.model.layers:
        for name, module in (("resid_mid", layer.post_attention_layernorm), ("z", layer.self_attn.o_proj)):
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def span_means(
    model: Qwen3ForCausalLM, replies: Sequence[Sampled], span: str
) -> tuple[Float[Tensor, "replies layers hidden"], Float[Tensor, "replies layers inner"]]:
    """Every reply's mean `resid_mid` and `z` over its span, in every layer."""
    tokens = [chain.encode(chain.prompt(reply.question)) + list(reply.reply) for reply in replies]
    lengths: dict[int, list[int]] = {}
    for place, ids in enumerate(tokens):
        lengths.setdefault(len(ids), []).append(place)
    means: dict[str, dict[int, Tensor]] = {"resid_mid": {}, "z": {}}
    for group in lengths.values():
        for start in range(0, len(group), BATCH):
            part = group[start : start + BATCH]
            with recorded(model) as seen:
                model.model(input_ids=torch.tensor([tokens[place] for place in part]), use_cache=False)
            for name, layers in seen.items():
                states = torch.stack(layers, 1)
                for row, place in enumerate(part):
                    means[name][place] = states[row][:, span_positions(replies[place], span)].mean(1)
    order = range(len(replies))
    return torch.stack([means["resid_mid"][i] for i in order]), torch.stack([means["z"][i] for i in order])


def extremes(replies: Sequence[Sampled]) -> tuple[list[Sampled], list[Sampled]]:
    """The shortest and the longest fifth of the closed replies within each question size."""
    short: list[Sampled] = []
    long: list[Sampled] = []
    for size in chain.SIZES:
        group = [reply for reply in replies if reply.closed and reply.question.size == size]
        low, high = np.quantile([reply.length for reply in group], [SHARE, 1 - SHARE])
        short += [reply for reply in group if reply.length <= low]
        long += [reply for reply in group if reply.length >= high]
    return short, long


def length_direction(model: Qwen3ForCausalLM, replies: Sequence[Sampled], span: str) -> LengthDirection:
    """The difference of means between the long and the short replies among these."""
    short, long = extremes(replies)
    short_residual, short_z = span_means(model, short, span)
    long_residual, _ = span_means(model, long, span)
    return LengthDirection(span, long_residual.mean(0) - short_residual.mean(0), short_z.mean(0))


def random_like(vector: Float[Tensor, "layers hidden"], seed: int) -> Float[Tensor, "layers hidden"]:
    """A random direction with the same norm in every layer."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    scaled: Tensor = noise / noise.norm(dim=-1, keepdim=True) * vector.norm(dim=-1, keepdim=True)
    return scaled


@contextmanager
def steered(
    model: Qwen3ForCausalLM, vector: Float[Tensor, "layers hidden"], coefficient: float, layers: Sequence[int]
) -> Iterator[None]:
    """Within it, coefficient * vector[l] is added to what attention writes in these layers, at all positions."""
    handles = [
        model.model.layers[layer].self_attn.register_forward_hook(
            lambda _, inputs, output, shift=coefficient * vector[layer]: (output[0] + shift, *output[1:])
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ranked_heads(model: Qwen3ForCausalLM, direction: LengthDirection) -> list[tuple[Head, float]]:
    """(layer, head) with its score, best first: how far the head writes against the direction in short replies."""
    heads, width = model.config.num_attention_heads, model.config.head_dim
    scores = []
    for number, layer in enumerate(model.model.layers):
        unit = direction.vector[number] / direction.vector[number].norm()
        pull = (unit @ layer.self_attn.o_proj.weight.detach()).view(heads, width)
        written = (direction.short_z[number].view(heads, width) * pull).sum(-1)
        scores += [((number, head), -float(written[head])) for head in range(heads)]
    return sorted(scores, key=lambda item: -item[1])


@torch.no_grad()
def think_edited(
    model: Qwen3ForCausalLM, vector: Float[Tensor, "layers hidden"], heads: Sequence[Head]
) -> Qwen3ForCausalLM:
    """A copy in which W_O[:, h] <- (I - v v^T) W_O[:, h] for the chosen heads, v the layer's unit direction."""
    edited, width = copy.deepcopy(model), model.config.head_dim
    for layer, head in heads:
        columns = edited.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width]
        unit = vector[layer] / vector[layer].norm()
        columns -= torch.outer(unit, unit @ columns)
    return edited
