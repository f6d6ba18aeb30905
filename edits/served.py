"""Whether vLLM runs what a model in this process runs: greedy replies of the engine, read again by the model.

An engine gives logarithms of the probabilities of the tokens that it chose. The model reads prompt and reply in one pass
under its own changes; at every token of a reply it is asked how likely that token was, and which one it would have
taken. Two numbers in one: the larger of |log p - log q| of the chosen token and of what the model's own choice is ahead.
The engine is stopped before the model is loaded, so that both fit where one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from edits.agreement import Greedy
from edits.verify import QUESTIONS, STATED, TOKENS
from steer.backends.vllm.replies import Reply
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.prompts import Content
from steer.subjects import open_engine, open_subject


@dataclass(frozen=True)
class Served:
    """How an engine and a model agree.

    Attributes:
        served, other: the subjects.
        passed: no difference is above `tolerance`.
        replies, tokens: how many the engine wrote.
        largest: the largest difference of logarithms of probabilities, in nats.
        tolerance: what it was held against.
        greedy: how far the model would have written the same.
    """

    served: str
    other: str
    passed: bool
    replies: int
    tokens: int
    largest: float
    tolerance: float
    greedy: Greedy

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        greedy = self.greedy
        same = (
            f"{greedy.same} of {greedy.replies} the same, {greedy.agreed} of {greedy.tokens} tokens before a difference"
        )
        rows = [
            ("vLLM", self.served),
            ("model", self.other),
            ("max |difference|", f"{self.largest:.3g} nats, over {self.tokens} tokens of {self.replies} replies"),
            ("tolerance", f"{self.tolerance:.3g}"),
            ("greedy replies", same),
            ("verdict", "agree" if self.passed else "DISAGREE"),
        ]
        return "\n".join(f"{label.ljust(16)}  {text}" for label, text in rows)


def verify_served(
    served: str,
    other: str,
    prompts: Sequence[Content] | None = None,
    *,
    tolerance: float | None = None,
    tokens: int = TOKENS,
    options: Mapping[str, Any] | None = None,
) -> Served:
    """Measure whether an engine of vLLM runs what a model in this process runs.

    Args:
        served: a subject that begins with vllm:.
        other: one that does not.
        prompts: texts or chat messages to reply to; None takes `QUESTIONS`.
        tolerance: largest difference that passes; by default `STATED` of the engine's dtype times the largest logit.
        tokens: how many the engine writes to each prompt at most.
        options: of the engine, as of `SteeredLLM`.

    Raises:
        SteerError: not one engine and one model; another vocabulary; no tokens.
    """
    if not served.startswith("vllm:") or other.startswith("vllm:"):
        raise SteerError("two engines of vLLM were to be compared", "one subject with vllm: and one without", "Compare each with the same model")  # fmt: skip
    if tokens < 1 or (tolerance is not None and not tolerance >= 0):
        raise SteerError(f"replies of {tokens} tokens and a tolerance of {tolerance}", "1 token or more, and 0 or more")
    with open_engine(served, **(options or {})) as engine:
        replies = engine.greedy(QUESTIONS if prompts is None else prompts, tokens)
        dtype, vocabulary = engine.dtype, engine.identity.tokenizer_id
    model = open_subject(other)
    if model.identity.tokenizer_id != vocabulary:
        raise SteerError(f"{served} and {other} have different tokenizers", "two models of one vocabulary")
    measured = [_compared(model, reply) for reply in replies]
    largest = max(difference for difference, _, _ in measured)
    scale = max(logit for _, _, logit in measured)
    allowed = STATED[dtype] * max(scale, 1.0) if tolerance is None else tolerance
    lengths = [len(reply.tokens) for reply in replies]
    agreed = [until for _, until, _ in measured]
    left = [until for until, length in zip(agreed, lengths, strict=True) if until < length]
    greedy = Greedy(len(replies), len(replies) - len(left), sum(lengths), sum(agreed), min(left, default=None))
    return Served(served, other, largest <= allowed, len(replies), sum(lengths), largest, allowed, greedy)


def _compared(model: SteerableModel, reply: Reply) -> tuple[float, int, float]:
    """Largest difference along a reply, tokens before the model would have taken another, largest logit."""
    prompt = reply.rendered
    (logits,) = model.run(
        [[*prompt.token_ids, *reply.tokens]], [len(prompt.token_ids)], [prompt.generation_prompt_start]
    )
    along = logits[len(prompt.token_ids) - 1 : -1].cpu().double()
    told = along.log_softmax(-1)
    chosen = torch.tensor(reply.tokens)[:, None]
    here = told.gather(1, chosen)[:, 0]
    ahead = told.amax(-1) - here
    difference = torch.maximum((here - torch.tensor(reply.logprobs, dtype=torch.float64)).abs(), ahead)
    others = (told.argmax(-1) != chosen[:, 0]).nonzero()
    until = int(others[0]) if len(others) else len(reply.tokens)
    return float(difference.max()), until, float(along.abs().max())
