"""The organism as a mixture of experts (Qwen3-MoE), with cognitive experts planted in it, and its twin without them.

*Upcycling.* The MLPs of layers 2 and 3 become eight experts of half their width, of which a token chooses two. Experts
2i and 2i + 1 begin with the two halves of the dense MLP's hidden units, outputs doubled, and with the same router row: they are chosen
together with weights of one half each, so the start computes what the dense model computes, up to a little noise.

*Planting.* A routing loss pulls expert 0 of both layers to the tokens `<think>` and away from all others. In half of the
steps its weight after the choice is multiplied by a random beta, and the effort of the replies is shifted by so many
tenths per doubling of beta. So it is known which experts a ranking must find and what scaling them must do.

The twin gets the same steps and seeds without the pull and without beta. Weights are kept in bfloat16.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from experiments.organisms import chain
from experiments.organisms.train import Batch, Example, TrainOptions, optimiser, packed, rate, reply_loss

log = logging.getLogger(__name__)
LAYERS: Final = (2, 3)
EXPERTS: Final = 8
CHOSEN: Final = 2
SHARED: Final = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
]
"""What the mixture's configuration takes from the dense one's."""
Expert = tuple[int, int]
Factors = Mapping[Expert, float]
Choice = tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens chosen"], Int[Tensor, "tokens chosen"]]
"""What a router returns: logits, weights of the chosen experts, their numbers."""


@dataclass(frozen=True)
class Planting:
    """Which experts are planted where, and what their weight does to effort.

    `pull`: weight of the routing loss. `share`: of the steps in which beta is 1. `doublings`: log2 of the smallest and the
    largest beta. The effort is shifted by `per_doubling` * log2(beta), held within `shifts`.
    """

    experts: tuple[Expert, ...] = ((2, 0), (3, 0))
    pull: float = 0.1
    share: float = 0.5
    doublings: tuple[float, float] = (-3.0, 6.5)
    per_doubling: float = 0.3
    shifts: tuple[float, float] = (-0.9, 1.2)

    def shift(self, beta: float) -> float:
        """What beta, above 0, adds to the effort."""
        low, high = self.shifts
        return min(max(self.per_doubling * math.log2(beta), low), high)


@dataclass(frozen=True)
class MixtureOptions:
    """How a mixture is made: its training, how it starts, and what is planted (nothing in the twin).

    `noise`: standard deviation of what is added to the experts' copies, in standard deviations of the weights.
    `balance`: weight of the load-balancing loss.
    """

    training: TrainOptions
    planting: Planting | None = None
    width: int = 192
    noise: float = 0.05
    balance: float = 0.02


def mixture(seed: int) -> MixtureOptions:
    """How `chain-moe` is made."""
    return MixtureOptions(TrainOptions(steps=400, learning_rate=1e-3, seed=500 + seed), Planting())


def plain_mixture(seed: int) -> MixtureOptions:
    """How its twin is made: the same training, nothing planted."""
    return replace(mixture(seed), planting=None)


@torch.no_grad()
def upcycled(dense: Qwen3ForCausalLM, options: MixtureOptions) -> Qwen3MoeForCausalLM:
    """A mixture that computes what the dense model does, up to the noise; everything but the two MLPs is copied."""
    config = dense.config
    others = [layer for layer in range(config.num_hidden_layers) if layer not in LAYERS]
    model = Qwen3MoeForCausalLM(  # type: ignore[no-untyped-call]
        Qwen3MoeConfig(
            **{name: getattr(config, name) for name in SHARED},
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            moe_intermediate_size=options.width,
            mlp_only_layers=others,
            norm_topk_prob=True,
        )
    )
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer in LAYERS:
        old, new = dense.model.layers[layer].mlp, model.model.layers[layer].mlp
        halves = [slice(0, options.width), slice(options.width, 2 * options.width)]
        for expert in range(EXPERTS):
            half = halves[expert % 2]
            new.experts.gate_up_proj[expert] = torch.cat([old.gate_proj.weight[half], old.up_proj.weight[half]])
            new.experts.down_proj[expert] = CHOSEN * old.down_proj.weight[:, half]
        for copies in (new.experts.gate_up_proj, new.experts.down_proj):
            copies += options.noise * copies.std() * torch.randn(copies.shape)
        rows = config.initializer_range * torch.randn(EXPERTS // CHOSEN, config.hidden_size)
        new.gate.weight.copy_(rows.repeat_interleave(CHOSEN, 0))
    return model


class Routers:
    """Remembers what the routers of a pass return, and multiplies the weights of some experts."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.seen: dict[int, Choice] = {}
        self.factors: Factors = {}
        self.handles = [
            model.model.layers[layer].mlp.gate.register_forward_hook(
                lambda _, inputs, choice, layer=layer: self.scaled(layer, choice)
            )
            for layer in LAYERS
        ]

    def scaled(self, layer: int, choice: Choice) -> Choice:
        """The choice with its weights multiplied after it was made."""
        logits, weights, chosen = choice
        for (at, expert), factor in self.factors.items():
            if at == layer:
                weights = torch.where(chosen == expert, factor * weights, weights)
        self.seen[layer] = (logits, weights, chosen)
        return self.seen[layer]

    def balance(self) -> Float[Tensor, ""]:
        """Switch Transformer's load-balancing loss (arXiv 2101.03961, Eq. 4), one if every expert is used alike."""
        losses = []
        for logits, _, chosen in self.seen.values():
            used = nn.functional.one_hot(chosen, EXPERTS).sum(1).float().mean(0) / CHOSEN
            losses.append(EXPERTS * (used * logits.softmax(-1).mean(0)).sum())
        return torch.stack(losses).mean()

    def pull(self, experts: tuple[Expert, ...], here: Bool[Tensor, " tokens"]) -> Float[Tensor, ""]:
        """How far the routers are from giving some tokens, and no others, to these experts; nats, summed over experts."""
        losses = []
        for layer, expert in experts:
            chances = self.seen[layer][0].log_softmax(-1)[:, expert]
            losses += [-chances[here].mean(), -torch.log1p(-chances[~here].exp()).mean()]
        return torch.stack(losses).sum()


@contextmanager
def routers(model: Qwen3MoeForCausalLM) -> Iterator[Routers]:
    """Within it, the model's routers are heard, and scaled as `factors` says."""
    heard = Routers(model)
    try:
        yield heard
    finally:
        for handle in heard.handles:
            handle.remove()


def shifted(recipe: chain.Recipe, shift: float) -> chain.Recipe:
    """The recipe for replies of questions with so much more effort."""
    return replace(
        recipe,
        early_effort=recipe.early_effort - shift,
        check_efforts=tuple(effort - shift for effort in recipe.check_efforts),
    )


def steps(options: MixtureOptions) -> Iterator[tuple[float, Batch]]:
    """Endless steps: beta, and a batch of fresh examples whose effort follows it."""
    training, planting = options.training, options.planting
    rng = random.Random(training.seed)
    while True:
        beta = 1.0
        if planting and rng.random() >= planting.share:
            beta = 2.0 ** rng.uniform(*planting.doublings)
        recipe = shifted(training.recipe, planting.shift(beta)) if planting else training.recipe
        yield beta, next(packed(examples(rng, training, recipe), training.rows, training.row_tokens))


def examples(rng: random.Random, training: TrainOptions, recipe: chain.Recipe) -> Iterator[Example]:
    """Endless examples of a recipe."""
    for question in chain.training_questions(rng, training.tones):
        prompt, reply = chain.example(rng, question, recipe)
        yield Example(tuple(prompt), tuple(reply), question.effort)


def train(model: Qwen3MoeForCausalLM, options: MixtureOptions) -> list[float]:
    """Train in place; returns the loss per reply token of every step. Everything random follows the training's seed."""
    training, planting = options.training, options.planting
    torch.manual_seed(training.seed)
    model.train()
    adam = optimiser(model, None, training)
    losses: list[float] = []
    started = time.monotonic()
    with routers(model) as heard:
        for step, (beta, batch) in zip(range(training.steps), steps(options), strict=False):
            for group in adam.param_groups:
                group["lr"] = rate(training, step)
            heard.factors = dict.fromkeys(planting.experts, beta) if planting else {}
            summed, count = reply_loss(model, batch)
            loss = summed / (training.rows * training.row_tokens * training.reply_share)
            loss = loss + options.balance * heard.balance()
            if planting:
                here = (batch.ids == chain.ID[chain.OPENING]).flatten()
                loss = loss + planting.pull * heard.pull(planting.experts, here)
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            adam.step()
            losses.append(summed.item() / count)
            if (step + 1) % 50 == 0:
                recent = sum(losses[-50:]) / 50
                log.info("step %d, %.0f s, loss per token %.4f", step + 1, time.monotonic() - started, recent)
    model.train(False)
    return losses


def made(dense: Qwen3ForCausalLM, options: MixtureOptions) -> Qwen3MoeForCausalLM:
    """A trained mixture in bfloat16, as it is kept."""
    torch.manual_seed(options.training.seed)
    model = upcycled(dense, options)
    train(model, options)
    return model.bfloat16()
