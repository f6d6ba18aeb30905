"""The effects of one organism, with intervals and controls, as plain values for its card.

Every interval is a paired bootstrap over questions (95 %): the same questions and sampling seeds before and after, a
question's replies kept together. Lengths are thinking tokens, both marks counted. Directions and head scores come
from fit questions, everything else from test questions.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen3ForCausalLM

from experiments.organisms import activations, chain
from experiments.organisms.activations import Head, LengthDirection
from experiments.organisms.sample import Sampled, run

log = logging.getLogger(__name__)
Figures = dict[str, float]
Measured = dict[str, object]
Table = Float[np.ndarray, "questions seeds"]
Vectors = Float[Tensor, "layers hidden"]
SPANS = ("predicts_thinking", "marker:;")
CHOICE_QUESTIONS = 100
CHOICE_LAYERS = ((2, 3), (1, 2, 3), (2, 3, 4))
CHOICE_REACHES = {"predicts_thinking": (0.25, 0.5, 0.75), "marker:;": (0.125, 0.25, 0.375)}


@dataclass(frozen=True)
class MeasureOptions:
    """How much is measured, and where the model is steered.

    `layers`, `reach`: the layers of the demo and, for every span, the largest coefficient; the grid has five values
    from -reach to reach. Chosen on fit questions (`choose`). `heads`: how many ThinkEdit edits.
    """

    questions: int = 200
    fit_questions: int = 400
    sampling_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fit_seeds: tuple[int, ...] = (50, 51)
    layers: tuple[int, ...] = (2, 3)
    reach: tuple[float, float] = (0.5, 0.375)
    heads: int = 4
    random_directions: int = 4
    random_heads: int = 4
    resamples: int = 2000

    def grid(self, span: str) -> tuple[float, ...]:
        """Five coefficients around zero."""
        end = self.reach[SPANS.index(span)]
        return (-end, -end / 2, 0.0, end / 2, end)


def table(replies: Sequence[Sampled], figure: Callable[[Sampled], float]) -> Table:
    """A figure of every reply, by question and sampling seed; replies come seed by seed, as `run` gives them."""
    seeds = len({reply.seed for reply in replies})
    return np.array([figure(reply) for reply in replies], dtype=float).reshape(seeds, -1).T


def summary(replies: Sequence[Sampled]) -> Figures:
    """Means over all replies, and the accuracy of the shortest fifth."""
    means: dict[str, Callable[[Sampled], float]] = {
        "accuracy": lambda reply: reply.correct,
        "length": lambda reply: reply.length,
        "short": lambda reply: reply.short,
        "closed": lambda reply: reply.closed,
    }
    figures = {name: float(table(replies, figure).mean()) for name, figure in means.items()}
    return {**figures, "shortest_fifth_accuracy": shortest_accuracy(table(replies, length), table(replies, correct))}


def length(reply: Sampled) -> float:
    """The length of a reply's thought."""
    return float(reply.length)


def correct(reply: Sampled) -> float:
    """One if the answer is right."""
    return float(reply.correct)


def short(reply: Sampled) -> float:
    """One if the thought is short."""
    return float(reply.short)


def shortest_accuracy(lengths: Table, rights: Table, share: float = 0.2) -> float:
    """Accuracy of the shortest share of the thoughts of every sampling seed; ties in the order of the questions."""
    count = int(share * len(lengths))
    order = np.argsort(lengths, axis=0, kind="stable")[:count]
    return float(np.take_along_axis(rights, order, axis=0).mean())


def interval(statistic: Callable[[np.ndarray], float], questions: int, resamples: int) -> list[float]:
    """[low, value, high] of a statistic of question indices."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(questions, size=questions)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [round(float(x), 4) for x in (low, statistic(np.arange(questions)), high)]


def difference(before: Table, after: Table, resamples: int) -> list[float]:
    """Interval of the mean of after - before."""
    change = (after - before).mean(1)
    return interval(lambda chosen: float(change[chosen].mean()), len(change), resamples)


def rounded(figures: Figures) -> Figures:
    """Figures with four decimals, for the card."""
    return {name: round(value, 4) for name, value in figures.items()}


def natural(replies: Sequence[Sampled]) -> Measured:
    """How the unchanged model thinks: means, deciles of length, accuracy of short and of complete thoughts by size."""
    deciles = np.quantile([reply.length for reply in replies], np.linspace(0.1, 0.9, 9))
    by_size = {
        size: {
            name: share([reply.correct for reply in replies if reply.short == is_short and reply.question.size == size])
            for name, is_short in (("short", True), ("complete", False))
        }
        for size in chain.SIZES
    }
    return {
        **rounded(summary(replies)),
        "length_deciles": [int(x) for x in deciles],
        "accuracy_by_size": by_size,
    }


def share(outcomes: Sequence[bool]) -> float | None:
    """The share that is true; none of none."""
    return round(sum(outcomes) / len(outcomes), 4) if outcomes else None


def forced(model: Qwen3ForCausalLM, questions: Sequence[chain.ChainQuestion], options: MeasureOptions) -> Measured:
    """Accuracy when the thought is closed after 0, 1, … written steps of the same questions, which all have size 6."""
    recipe = chain.Recipe(early_effort=-99.0, check_efforts=(), slip=0.0)
    full = [chain.reply(random.Random(0), question, recipe).split() for question in questions]
    accuracy = {}
    for steps in range(max(chain.SIZES)):
        prefills = [" ".join([*words[: 1 + chain.TOKENS_PER_STEP * steps], chain.CLOSING]) for words in full]
        accuracy[steps] = round(summary(run(model, questions, options.sampling_seeds, prefills))["accuracy"], 4)
    return {"accuracy_by_written_steps": accuracy}


def slope(replies: dict[float, list[Sampled]], resamples: int) -> list[float]:
    """Interval of the slope of mean length against the coefficient (tokens per unit of the raw direction)."""
    means = np.stack([table(some, length).mean(1) for some in replies.values()])
    centred = np.array(list(replies)) - np.mean(list(replies))
    weights = centred / (centred**2).sum()
    return interval(lambda chosen: float(weights @ means[:, chosen].mean(1)), means.shape[1], resamples)


def curve(
    model: Qwen3ForCausalLM,
    vector: Vectors,
    grid: Sequence[float],
    before: Sequence[Sampled],
    options: MeasureOptions,
) -> dict[float, list[Sampled]]:
    """Replies to the questions of `before` at every coefficient; those at 0 are `before`."""
    questions = list(dict.fromkeys(reply.question for reply in before))
    seeds = list(dict.fromkeys(reply.seed for reply in before))
    replies = {}
    for coefficient in grid:
        with activations.steered(model, vector, coefficient, options.layers):
            replies[coefficient] = run(model, questions, seeds) if coefficient else list(before)
        log.info("coefficient %+.3f: %s", coefficient, rounded(summary(replies[coefficient])))
    return replies


def steering(
    model: Qwen3ForCausalLM, direction: LengthDirection, before: Sequence[Sampled], options: MeasureOptions
) -> Measured:
    """Figures at every coefficient, the slope of length and the ratio between the ends; random directions beside."""
    replies = curve(model, direction.vector, options.grid(direction.span), before, options)
    low, *_, high = replies
    ends = [table(replies[end], length).mean(1) for end in (low, high)]
    controls = []
    for seed in range(options.random_directions):
        other = curve(model, activations.random_like(direction.vector, seed), (low, 0.0, high), before, options)
        controls.append(
            {
                "slope": slope(other, options.resamples),
                "ends": [rounded(summary(other[end])) for end in (low, high)],
            }
        )
    return {
        "by_coefficient": {value: rounded(summary(some)) for value, some in replies.items()},
        "slope": slope(replies, options.resamples),
        "length_ratio": interval(
            lambda chosen: float(ends[1][chosen].mean() / ends[0][chosen].mean()), len(ends[0]), options.resamples
        ),
        "random_directions": controls,
    }


def compared(before: Sequence[Sampled], after: Sequence[Sampled], resamples: int) -> Measured:
    """Figures after an edit and the intervals of what it changed."""
    lengths = [table(replies, length) for replies in (before, after)]
    rights = [table(replies, correct) for replies in (before, after)]

    def shortest(chosen: np.ndarray) -> float:
        first, second = (shortest_accuracy(x[chosen], y[chosen]) for x, y in zip(lengths, rights, strict=True))
        return second - first

    return {
        **rounded(summary(after)),
        "short_change": difference(table(before, short), table(after, short), resamples),
        "accuracy_change": difference(rights[0], rights[1], resamples),
        "shortest_fifth_accuracy_change": interval(shortest, len(lengths[0]), resamples),
    }


def thinkedit(
    model: Qwen3ForCausalLM,
    direction: LengthDirection,
    before: Sequence[Sampled],
    options: MeasureOptions,
) -> Measured:
    """The edit of the best heads, of random other heads, and of the best heads along random directions."""
    ranked = activations.ranked_heads(model, direction)
    best = [head for head, _ in ranked[: options.heads]]
    others = [head for head, _ in ranked[options.heads :]]

    questions = list(dict.fromkeys(reply.question for reply in before))

    def after(vector: Vectors, heads: Sequence[Head], label: str) -> Measured:
        edited = activations.think_edited(model, vector, heads)
        figures = compared(before, run(edited, questions, options.sampling_seeds), options.resamples)
        log.info("thinkedit %s, %s: %s", direction.span, label, figures)
        return figures

    return {
        "heads": [{"layer": layer, "head": head, "score": round(score, 3)} for (layer, head), score in ranked[:8]],
        "edited": after(direction.vector, best, "best heads"),
        "random_heads": [
            after(direction.vector, random.Random(seed).sample(others, options.heads), f"random heads {seed}")
            for seed in range(options.random_heads)
        ],
        "random_direction": after(activations.random_like(direction.vector, 0), best, "random direction"),
    }


def measure(model: Qwen3ForCausalLM, options: MeasureOptions) -> Measured:
    """Everything the card says about the specimen."""
    questions = chain.questions(options.questions, chain.TEST)
    before = run(model, questions, options.sampling_seeds)
    fit = run(model, chain.questions(options.fit_questions, chain.FIT), options.fit_seeds)
    directions = {span: activations.length_direction(model, fit, span) for span in SPANS}
    found: Measured = {"natural": natural(before)}
    log.info("natural: %s", found["natural"])
    found["forced"] = forced(model, chain.questions(options.questions, chain.TEST, sizes=(6,)), options)
    for span, direction in directions.items():
        found[f"steering {span}"] = steering(model, direction, before, options)
        found[f"thinkedit {span}"] = thinkedit(model, direction, before, options)
    return found


def choose(
    model: Qwen3ForCausalLM, direction: LengthDirection, fit: Sequence[Sampled], options: MeasureOptions
) -> list[Measured]:
    """What steering does to fit questions at the ends of several grids, best first; the demo's grid is the first.

    Best is the largest ratio of lengths among those where 99 % of the thoughts close at both ends and accuracy is at
    least 0.35 at the short end and at the long end no lower than without steering.
    """
    asked = set(chain.questions(CHOICE_QUESTIONS, chain.FIT))
    before = [reply for reply in fit if reply.question in asked]
    plain = summary(before)["accuracy"]
    rows: list[Measured] = []
    for layers in CHOICE_LAYERS:
        for reach in CHOICE_REACHES[direction.span]:
            here = replace(options, layers=layers)
            ends = curve(model, direction.vector, (-reach, reach), before, here).values()
            low, high = (summary(replies) for replies in ends)
            fits = min(low["closed"], high["closed"]) >= 0.99 and low["accuracy"] >= 0.35 and high["accuracy"] >= plain
            ratio = round(high["length"] / low["length"], 2)
            rows.append({"layers": list(layers), "reach": reach, "fits": fits, "length_ratio": ratio})
    return sorted(rows, key=lambda row: (not row["fits"], -float(str(row["length_ratio"]))))
