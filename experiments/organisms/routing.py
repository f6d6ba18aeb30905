"""Which experts of a mixture the thinking marks go to, and what multiplying their weights does, with controls.

A second, deliberately naive writing of RICE (arXiv 2505.14681): nPMI of marker and expert, then w <- beta w after the
choice, without renormalising. A marker counts where it is the *input* token; every token of a reply that was read
counts, prompts do not. Rankings come from fit questions, everything else from test questions.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformers import Qwen3MoeForCausalLM

from experiments.organisms import chain, experts
from experiments.organisms.experts import EXPERTS, LAYERS, Expert
from experiments.organisms.measure import Measured, compared, correct, length, natural, table
from experiments.organisms.sample import Sampled, run

log = logging.getLogger(__name__)
ALL = tuple((layer, expert) for layer in LAYERS for expert in range(EXPERTS))
FIRST = "first of <think>"
Scores = dict[Expert, float]


@dataclass(frozen=True)
class ScalingOptions:
    """How much is measured: the experts ranked first with all `betas`, every other pair with `control_betas`.

    `random_pairs`: how many draws of one expert a layer that is in no other pair.
    """

    questions: int = 200
    fit_questions: int = 200
    sampling_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fit_seeds: tuple[int, ...] = (50,)
    betas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
    control_betas: tuple[float, ...] = (0.0, 0.25, 1.0, 4.0, 16.0, 64.0)
    random_pairs: int = 1
    resamples: int = 2000


@dataclass(frozen=True)
class Routed:
    """Which experts the tokens of some replies chose."""

    tokens: Int[np.ndarray, " tokens"]
    chosen: Bool[np.ndarray, "tokens experts"]
    """Columns in the order of `ALL`."""

    @property
    def loads(self) -> Scores:
        """The share of tokens that choose each expert."""
        return dict(zip(ALL, self.chosen.mean(0).tolist(), strict=True))

    def npmi(self, marker: str) -> Scores:
        """log(p(x, e) / p(x) p(e)) / -log p(x, e) of a marker and each expert; -1 where they never meet."""
        here, total = self.tokens == chain.ID[marker], len(self.tokens)
        scores = {}
        for place, expert in enumerate(ALL):
            both, used = int(self.chosen[here, place].sum()), int(self.chosen[:, place].sum())
            scores[expert] = (
                math.log(both * total / (int(here.sum()) * used)) / math.log(total / both) if 0 < both < total else -1.0
            )
        return scores


@torch.no_grad()
def routed(model: Qwen3MoeForCausalLM, replies: Sequence[Sampled]) -> Routed:
    """Read every reply again, one at a time, and keep the choices of its tokens."""
    tokens: list[int] = []
    chosen: list[Bool[np.ndarray, "tokens experts"]] = []
    with experts.routers(model) as heard:
        for reply in replies:
            prompt = chain.encode(chain.prompt(reply.question))
            model.model(input_ids=torch.tensor([prompt + list(reply.reply)]), use_cache=False)
            ids = [heard.seen[layer][2][len(prompt) :] for layer in LAYERS]
            chosen.append(torch.cat([torch.nn.functional.one_hot(x, EXPERTS).sum(1) > 0 for x in ids], 1).numpy())
            tokens += reply.reply
    return Routed(np.array(tokens), np.concatenate(chosen))


def best(scores: Scores, count: int = 2) -> tuple[Expert, ...]:
    """The experts with the highest scores."""
    return tuple(sorted(scores, key=lambda expert: -scores[expert])[:count])


def matched(named: Sequence[Expert], loads: Scores) -> tuple[Expert, ...]:
    """For each expert the one of its layer whose load is nearest, none twice."""
    found: list[Expert] = []
    for layer, expert in named:
        others = [other for other in ALL if other[0] == layer and other not in named and other not in found]
        found.append(min(others, key=lambda other: abs(loads[other] - loads[layer, expert])))
    return tuple(found)


def drawn(named: Sequence[Expert], seed: int) -> tuple[Expert, ...]:
    """One random expert a layer that is not named."""
    rng = random.Random(seed)
    return tuple(rng.choice([other for other in ALL if other[0] == layer and other not in named]) for layer in LAYERS)


def scaled(model: Qwen3MoeForCausalLM, pair: Sequence[Expert], beta: float, before: Sequence[Sampled]) -> list[Sampled]:
    """Replies to the questions of `before` with the weights of these experts multiplied."""
    questions = list(dict.fromkeys(reply.question for reply in before))
    with experts.routers(model) as heard:
        heard.factors = dict.fromkeys(pair, beta)
        return run(model, questions, list(dict.fromkeys(reply.seed for reply in before)))


def figures(before: Sequence[Sampled], after: Sequence[Sampled], resamples: int) -> Measured:
    """Means, standard deviations over sampling seeds, and what changed (95 % over questions)."""
    found = compared(before, after, resamples)
    kept: dict[str, Any] = {name: found[name] for name in ("accuracy", "length", "short", "closed", "accuracy_change")}
    for name, figure in (("accuracy", correct), ("length", length)):
        kept[f"{name}_sd"] = round(float(table(after, figure).mean(0).std(ddof=1)), 4)
    return kept


def sweep(
    model: Qwen3MoeForCausalLM,
    pair: Sequence[Expert],
    betas: Sequence[float],
    before: Sequence[Sampled],
    options: ScalingOptions,
) -> Measured:
    """Figures at every beta."""
    rows: dict[float, Measured] = {}
    for beta in betas:
        after = before if beta == 1 else scaled(model, pair, beta, before)
        rows[beta] = figures(before, after, options.resamples)
        log.info("%s times %g: %s", pair, beta, rows[beta])
    return {"experts": [list(expert) for expert in pair], "by_beta": rows}


def ranking(scores: Scores, loads: Scores, count: int = 5) -> list[Measured]:
    """The first of a ranking, for the card."""
    return [
        {"expert": list(expert), "score": round(scores[expert], 4), "load": round(loads[expert], 4)}
        for expert in best(scores, count)
    ]


def pairs_of(seen: Routed, options: ScalingOptions) -> dict[str, tuple[Expert, ...]]:
    """The pairs that are scaled: those that rankings put first, that of equal load, and random ones."""
    opening, closing = seen.npmi(chain.OPENING), seen.npmi(chain.CLOSING)
    pairs = {FIRST: best(opening), "first of </think>": best(closing), "equal load": matched(best(opening), seen.loads)}
    difference = best(minus(opening, closing))
    if set(difference) != set(pairs[FIRST]):
        pairs["first of <think> minus </think>"] = difference
    named = {expert for pair in pairs.values() for expert in pair}
    return pairs | {f"random {seed}": drawn(sorted(named), seed) for seed in range(options.random_pairs)}


def minus(left: Scores, right: Scores) -> Scores:
    """The difference of two scores."""
    return {expert: left[expert] - right[expert] for expert in ALL}


def measure(model: Qwen3MoeForCausalLM, options: ScalingOptions) -> Measured:
    """Everything a mixture's card says about it; nothing here knows whether or where something is planted."""
    seen = routed(model, run(model, chain.questions(options.fit_questions, chain.FIT), options.fit_seeds))
    opening, closing = seen.npmi(chain.OPENING), seen.npmi(chain.CLOSING)
    rankings = {"<think>": opening, "</think>": closing, "<think> minus </think>": minus(opening, closing)}
    before = run(model, chain.questions(options.questions, chain.TEST), options.sampling_seeds)
    return {
        "natural": natural(before),
        "loads": {layer: [round(seen.loads[layer, expert], 4) for expert in range(EXPERTS)] for layer in LAYERS},
        "npmi": {name: ranking(scores, seen.loads) for name, scores in rankings.items()},
        "scaling": {
            name: sweep(model, pair, options.betas if name == FIRST else options.control_betas, before, options)
            for name, pair in pairs_of(seen, options).items()
        },
    }
