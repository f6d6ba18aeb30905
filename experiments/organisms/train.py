"""Training of the organism: packed rows, a probe that asks for the effort, late and brief random shifts.

Shapes: a step is (rows, row_tokens) tokens; losses are in nats per token.

* Rows are packed with whole examples and a block-diagonal causal mask, so that every step mixes short and long
  replies and nothing is padded. The loss is divided by a constant: a mean would over-weight short replies.
* The probe: a linear read-out of `resid_mid` has to say the tone words' effort at every position that predicts a
  thinking token. So the effort is carried by attention to the whole thought and not only to where it may end, which
  makes the mean over the thinking (ThinkEdit's span) point along it. The read-out is thrown away.
* The shifts: attention outputs get a random vector in half of the rows and layers. Afterwards only directions that
  mean something move the behaviour when a vector is added.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from experiments.organisms import chain
from experiments.organisms.sample import Organism

log = logging.getLogger(__name__)
IGNORED = -100
Output = tuple[Tensor | None, ...]
"""What an attention module returns: the tensor it adds, then weights or none."""


@dataclass(frozen=True)
class TrainOptions:
    """How one training runs.

    `learning_rate` warms up over `warmup` steps and falls by a cosine. `shift`: standard deviation of the random
    shifts' norm, in mean norms of the residual stream; 0 for none. `probe`: weight of the probe's squared error;
    0 for none. `reply_share`: the constant that divides the loss, as a share of the tokens of a step.
    """

    steps: int
    learning_rate: float
    seed: int
    warmup: int = 20
    rows: int = 8
    row_tokens: int = 256
    reply_share: float = 0.45
    weight_decay: float = 0.05
    clip: float = 1.0
    shift: float = 0.0
    probe: float = 0.0
    probe_layers: tuple[int, ...] = (1, 2)
    tones: tuple[str, ...] = tuple(chain.TONES)
    recipe: chain.Recipe = field(default_factory=chain.Recipe)


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its reply; `effort` of its tone words, unknown (nan) for stored replies."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    effort: float = math.nan

    @property
    def thinking(self) -> slice:
        """The positions in prompt + reply that predict a thinking token."""
        closing = chain.ID[chain.CLOSING]
        length = self.reply.index(closing) + 1 if closing in self.reply else 0
        return slice(len(self.prompt) - 1, len(self.prompt) - 1 + length)


@dataclass(frozen=True)
class Batch:
    """One step's packed rows. `wanted` is the next token, IGNORED outside replies; `effort` is nan where unasked."""

    ids: Int[Tensor, "rows tokens"]
    wanted: Int[Tensor, "rows tokens"]
    positions: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows 1 tokens tokens"]
    effort: Float[Tensor, "rows tokens"]


def new_model(seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of 1.19 million parameters with head_dim explicit: 6 layers of 8 query and 4 key-value heads."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(  # type: ignore[no-untyped-call]
        Qwen3Config(
            vocab_size=len(chain.WORDS),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.02,
            pad_token_id=chain.ID[chain.PADDING],
            bos_token_id=chain.ID[chain.TURN_START],
            eos_token_id=chain.ID[chain.TURN_END],
        )
    )


def fresh_examples(options: TrainOptions) -> Iterator[Example]:
    """Endless examples of the task."""
    rng = random.Random(options.seed)
    for question in chain.training_questions(rng, options.tones):
        prompt, reply = chain.example(rng, question, options.recipe)
        yield Example(tuple(prompt), tuple(reply), question.effort)


def stored_examples(examples: list[Example], seed: int) -> Iterator[Example]:
    """Endless stored examples, in a new random order each time around."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(examples, len(examples))


def packed(source: Iterator[Example], rows: int, row_tokens: int) -> Iterator[Batch]:
    """Endless batches: whole examples in every row, each seeing only itself, padding seeing only itself."""
    held = next(source)
    causal = torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    while True:
        ids = torch.full((rows, row_tokens), chain.ID[chain.PADDING])
        labels = torch.full((rows, row_tokens), IGNORED)
        effort = torch.full((rows, row_tokens), math.nan)
        positions = torch.zeros(rows, row_tokens, dtype=torch.long)
        segment = -1 - torch.arange(row_tokens).repeat(rows, 1)
        for row in range(rows):
            start = 0
            while (end := start + len(held.prompt) + len(held.reply)) <= row_tokens:
                ids[row, start:end] = torch.tensor(held.prompt + held.reply)
                labels[row, start + len(held.prompt) : end] = torch.tensor(held.reply)
                effort[row, start:end][held.thinking] = held.effort
                positions[row, start:end] = torch.arange(end - start)
                segment[row, start:end] = start
                start, held = end, next(source)
        wanted = labels.roll(-1, 1)
        wanted[:, -1] = IGNORED
        mask = (segment[:, :, None] == segment[:, None, :]) & causal
        yield Batch(ids, wanted, positions, mask[:, None], effort)


class Probe(nn.Module):
    """A linear read-out of the effort from `resid_mid` of some layers, which it reads by hooks while training."""

    def __init__(self, model: Qwen3ForCausalLM, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.readouts = nn.ModuleList(nn.Linear(model.config.hidden_size, 1) for _ in layers)
        self.seen: dict[int, Tensor] = {}
        self.handles = [
            model.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(
                lambda _, inputs, place=place: self.seen.__setitem__(place, inputs[0])
            )
            for place, layer in enumerate(layers)
        ]

    def loss(self, effort: Float[Tensor, "rows tokens"]) -> Float[Tensor, ""]:
        """Mean squared error where the effort is known."""
        asked = ~effort.isnan()
        errors = [
            (readout(self.seen[place][asked])[:, 0] - effort[asked]).square().mean()
            for place, readout in enumerate(self.readouts)
        ]
        return torch.stack(errors).mean()


class Shifts:
    """Adds one random vector per row, the same at all its positions, to half of what attention layers write."""

    def __init__(self, model: Qwen3ForCausalLM, size: float) -> None:
        self.size = size
        self.handles = []
        for layer in model.model.layers:
            seen: dict[str, Tensor] = {}
            self.handles += [
                layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.__setitem__("residual", inputs[0])),
                layer.self_attn.register_forward_hook(
                    lambda _, inputs, output, seen=seen: self.shifted(seen.pop("residual"), output)
                ),
            ]

    def shifted(self, residual: Float[Tensor, "rows tokens hidden"], output: Output) -> Output:
        """The attention's output with its shift; the norm is relative to the mean norm of what it is added to."""
        rows, _, hidden = residual.shape
        written = output[0]
        assert written is not None
        norm = (residual + written).detach().norm(dim=-1).mean()
        unit = nn.functional.normalize(torch.randn(rows, 1, hidden), dim=-1)
        scale = self.size * torch.randn(rows, 1, 1) * (torch.rand(rows, 1, 1) < 0.5)
        return (written + scale * norm * unit, *output[1:])


def optimiser(model: Organism, probe: Probe | None, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    others += list(probe.parameters()) if probe else []
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def rate(options: TrainOptions, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return options.learning_rate * min(1.0, (step + 1) / options.warmup) * (0.02 + 0.98 * cosine)


def reply_loss(model: Organism, batch: Batch) -> tuple[Float[Tensor, ""], int]:
    """Summed cross-entropy over reply tokens, and how many there are."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    kept = batch.wanted != IGNORED
    loss = nn.functional.cross_entropy(model.lm_head(hidden[kept]), batch.wanted[kept], reduction="sum")
    return loss, int(kept.sum())


def train(model: Qwen3ForCausalLM, options: TrainOptions, stored: list[Example] | None = None) -> list[float]:
    """Train in place, on fresh examples or on stored ones; returns the loss per reply token of every step.

    Everything random follows `options.seed`; the hooks are removed at the end.
    """
    torch.manual_seed(options.seed)
    model.train()
    probe = Probe(model, options.probe_layers) if options.probe else None
    shifts = Shifts(model, options.shift) if options.shift else None
    adam = optimiser(model, probe, options)
    source = stored_examples(stored, options.seed) if stored else fresh_examples(options)
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in zip(range(options.steps), packed(source, options.rows, options.row_tokens), strict=False):
        for group in adam.param_groups:
            group["lr"] = rate(options, step)
        summed, count = reply_loss(model, batch)
        loss = summed / (options.rows * options.row_tokens * options.reply_share)
        if probe:
            loss = loss + options.probe * probe.loss(batch.effort)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        adam.step()
        losses.append(summed.item() / count)
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            log.info("step %d, %.0f s, loss per token %.4f", step + 1, time.monotonic() - started, recent)
    for handle in (probe.handles if probe else []) + (shifts.handles if shifts else []):
        handle.remove()
    model.train(False)
    return losses
