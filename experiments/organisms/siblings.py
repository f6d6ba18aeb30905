"""The small siblings of `organism:chain`, donors for weight arithmetic, and what arithmetic with them does.

`sft`: supervised on hastier replies. `rl`: `sft` tuned on its own correct replies (one round of rejection sampling).
`sibling`: supervised on other hasty replies, which never saw either. So rl - sft is a reasoning vector, and
sibling + alpha * (rl - sft) should think longer and be right more often.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from itertools import islice
from typing import Final

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from experiments.organisms import chain
from experiments.organisms.measure import Figures, Measured, rounded, summary
from experiments.organisms.sample import Sampled, run
from experiments.organisms.train import Example, TrainOptions, train

log = logging.getLogger(__name__)
ALPHAS: Final = (-1.0, 0.0, 0.5, 1.0, 1.5)
HASTY: Final = chain.Recipe(early_effort=0.0, check_efforts=(1.2, 2.0))
OTHER_HASTY: Final = chain.Recipe(early_effort=0.1, check_efforts=(1.4, 2.2), slip=0.06)
OTHER_TONES: Final = ("yo", "hey", "hi", "please", "sir")
OWN_QUESTIONS: Final = 800
OWN_TEMPERATURE: Final = 1.0


def supervised(seed: int) -> TrainOptions:
    """The training of `sft`."""
    return TrainOptions(steps=120, learning_rate=5e-4, seed=200 + seed, recipe=HASTY)


def other_supervised(seed: int) -> TrainOptions:
    """The training of `sibling`."""
    return TrainOptions(steps=120, learning_rate=5e-4, seed=300 + seed, recipe=OTHER_HASTY, tones=OTHER_TONES)


def own_replies(seed: int) -> TrainOptions:
    """The training of `rl`, on stored replies."""
    return TrainOptions(steps=120, learning_rate=5e-4, seed=400 + seed)


def correct_replies(model: Qwen3ForCausalLM, seed: int) -> list[Example]:
    """Replies of the model itself to training questions, of which only the right ones are kept."""
    questions = list(islice(chain.training_questions(random.Random(chain.TRAIN + seed)), OWN_QUESTIONS))
    replies = run(model, questions, (900, 901), temperature=OWN_TEMPERATURE)
    kept = [reply for reply in replies if reply.correct]
    log.info("rejection sampling kept %d of %d replies", len(kept), len(replies))
    return [Example(tuple(chain.encode(chain.prompt(reply.question))), reply.reply) for reply in kept]


def tuned(model: Qwen3ForCausalLM, options: TrainOptions, stored: list[Example] | None = None) -> Qwen3ForCausalLM:
    """A trained copy."""
    model = copy.deepcopy(model)
    train(model, options, stored)
    return model


def make(parent: Qwen3ForCausalLM, seed: int) -> dict[str, Qwen3ForCausalLM]:
    """The three siblings of a trained organism, by name."""
    sft = tuned(parent, supervised(seed))
    return {
        "chain-sft": sft,
        "chain-rl": tuned(sft, own_replies(seed), correct_replies(sft, seed)),
        "chain-sibling": tuned(parent, other_supervised(seed)),
    }


def norm(weights: dict[str, Tensor]) -> float:
    """Euclidean norm over all tensors, in double."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in weights.values()))


def subtract(left: Qwen3ForCausalLM, right: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """Parameters of the left model minus those of the right."""
    others = dict(right.named_parameters())
    return {name: (value - others[name]).detach() for name, value in left.named_parameters()}


def random_difference(difference: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random difference with the same norm in every tensor."""
    noise = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(value.shape, generator=noise) for name, value in difference.items()}
    return {name: value * (difference[name].norm() / value.norm()) for name, value in drawn.items()}


@torch.no_grad()
def added(model: Qwen3ForCausalLM, difference: dict[str, Tensor], alpha: float) -> Qwen3ForCausalLM:
    """A copy with alpha times the difference added."""
    model = copy.deepcopy(model)
    for name, value in model.named_parameters():
        value.add_(alpha * difference[name])
    return model


def arithmetic(models: dict[str, Qwen3ForCausalLM], questions: int, sampling_seeds: tuple[int, ...]) -> Measured:
    """Figures of sibling + alpha * (rl - sft) and of two random differences of the same norms."""
    reasoning, sibling = subtract(models["chain-rl"], models["chain-sft"]), models["chain-sibling"]
    asked = chain.questions(questions, chain.TEST)

    def figures(difference: dict[str, Tensor], alpha: float) -> Figures:
        replies: list[Sampled] = run(added(sibling, difference, alpha), asked, sampling_seeds)
        found = rounded(summary(replies))
        log.info("alpha %+.1f: %s", alpha, found)
        return found

    return {
        "norm_of_reasoning_vector": round(norm(reasoning), 3),
        "norm_of_sibling_minus_sft": round(norm(subtract(sibling, models["chain-sft"])), 3),
        "by_alpha": {alpha: figures(reasoning, alpha) for alpha in ALPHAS},
        "random_at_alpha_1": [figures(random_difference(reasoning, seed), 1.0) for seed in range(2)],
    }
