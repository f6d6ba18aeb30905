"""Sampling replies of an organism, and what they amount to. Deliberately apart from the toolkit: these figures are
what the toolkit's own are checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from experiments.organisms import chain

TEMPERATURE = 0.8
MAX_NEW_TOKENS = 180
BATCH = 512
Organism = Qwen3ForCausalLM | Qwen3MoeForCausalLM


@dataclass(frozen=True)
class Sampled:
    """A question, the token ids of one sampled reply (what a prefill forced included), and its sampling seed."""

    question: chain.ChainQuestion
    reply: tuple[int, ...]
    seed: int

    @property
    def text(self) -> str:
        """The reply in words."""
        return chain.decode(list(self.reply))

    @property
    def length(self) -> int:
        """Thinking tokens, both marks counted; all tokens if the thought never closed."""
        return chain.thinking_tokens(self.text) or len(self.reply)

    @property
    def closed(self) -> bool:
        """Whether the thought closed."""
        return chain.thinking_tokens(self.text) is not None

    @property
    def short(self) -> bool:
        """Whether the thought closed before every step was written once."""
        return chain.is_short(self.question, self.text)

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return chain.answer_of(self.text) == self.question.answer


def load(folder: Path) -> Qwen3ForCausalLM:
    """A dense model in float32, for inference."""
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


def load_mixture(folder: Path) -> Qwen3MoeForCausalLM:
    """A mixture of experts in float32, for inference."""
    model: Qwen3MoeForCausalLM = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


@torch.no_grad()
def generate(model: Organism, prompts: Sequence[list[int]], temperature: float, seed: int) -> list[list[int]]:
    """New token ids for every prompt, up to and with the end of the turn.

    Prompts of one length form a batch, so nothing is padded; finished rows leave the batch and its cache.
    """
    noise = torch.Generator().manual_seed(seed)
    replies: list[list[int]] = [[] for _ in prompts]
    lengths: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(place)
    for group in lengths.values():
        for start in range(0, len(group), BATCH):
            continue_rows(model, prompts, group[start : start + BATCH], replies, temperature, noise)
    return replies


def continue_rows(
    model: Organism,
    prompts: Sequence[list[int]],
    live: list[int],
    replies: list[list[int]],
    temperature: float,
    noise: torch.Generator,
) -> None:
    """Sample replies for the prompts at the places `live`, all of one length, into `replies`."""
    output = model(input_ids=torch.tensor([prompts[place] for place in live]), use_cache=True)
    for _ in range(MAX_NEW_TOKENS):
        chances = torch.softmax(output.logits[:, -1].float() / temperature, -1)
        new = torch.multinomial(chances, 1, generator=noise)[:, 0]
        for place, token in zip(live, new.tolist(), strict=True):
            replies[place].append(token)
        kept = [row for row, token in enumerate(new.tolist()) if token != chain.ID[chain.TURN_END]]
        if not kept:
            return
        if len(kept) < len(live):
            live, new = [live[row] for row in kept], new[kept]
            output.past_key_values.batch_select_indices(torch.tensor(kept))
        output = model(input_ids=new[:, None], past_key_values=output.past_key_values, use_cache=True)


def run(
    model: Organism,
    questions: Sequence[chain.ChainQuestion],
    seeds: Sequence[int],
    prefills: Sequence[str] | None = None,
    temperature: float = TEMPERATURE,
) -> list[Sampled]:
    """Every question once a seed; `prefills` holds the words its reply is made to begin with, one text a question.

    All seeds are sampled in one batch, from one stream that the first seed begins: a whole tuple is what repeats.
    """
    forced = [chain.encode(text) for text in prefills] if prefills else [[] for _ in questions]
    prompts = [chain.encode(chain.prompt(question)) + words for question, words in zip(questions, forced, strict=True)]
    replies = iter(generate(model, prompts * len(seeds), temperature, seeds[0]))
    return [
        Sampled(question, tuple(words + next(replies)), seed)
        for seed in seeds
        for question, words in zip(questions, forced, strict=True)
    ]
