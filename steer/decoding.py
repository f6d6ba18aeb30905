"""The rows of a batch in flight: prefill, one step, rows leaving and entering."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steer.anatomy.resolve import Anatomy
from steer.kvcache import RowCache
from steer.marks import Marks
from steer.phases import State
from steer.policy import REMEMBERED, PolicyRows
from steer.positions import Positions
from steer.prompts import Prompt, Rendered
from steer.routes import Routes
from steer.trace import FinishReason


class Decodable(Protocol):
    """What decoding needs of a model; `steer.model.SteerableModel` has it."""

    hf: Any
    tokenizer: Any

    @property
    def marks(self) -> Marks:
        """The tokenizer's marks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """Which layers it has."""
        ...

    def at(self, positions: Positions) -> AbstractContextManager[Any]:
        """Make the phases of a batch known to the hooks for the forwards inside."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Enter the changes of a view made by `with_`."""
        ...

    @property
    def routes(self) -> Sequence[Routes]:
        """What keeps the routed experts of replies now."""
        ...


@dataclass
class Reply:
    """One sequence while it is written.

    Attributes:
        prompt, rendered, sample: what is replied to, and which of the replies this is.
        limit: longest completion in tokens.
        uniforms: the sequence's random numbers, one per step; empty at temperature 0.
        tokens: the completion so far.
        forced: indices into `tokens` that a policy wrote.
        finish: why it ended; None while it runs.
    """

    prompt: Prompt
    rendered: Rendered
    sample: int
    limit: int
    uniforms: NDArray[np.float64]
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Question and sample."""
        return self.prompt.id, self.sample

    @property
    def forced_run(self) -> int:
        """Forced tokens at the end of what is written so far."""
        run, last = 0, len(self.tokens) - 1
        while run < len(self.forced) and self.forced[-1 - run] == last - run:
            run += 1
        return run


def _keeps_last(kind: Any) -> bool:
    """Whether a model class can return the logits of the last position alone."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


class Batch:
    """Replies that are decoded together.

    Attributes:
        replies: one per row.
        mask: (row, column), True where a row has a token; rows end at the same column.
        positions: the rows' phases.
        logits: (row, vocab) of each row's next token.
    """

    def __init__(self, model: Decodable, replies: Sequence[Reply]) -> None:
        """Prefill: each prompt is read once, however many of the replies are to it."""
        self.model = model
        self.replies = list(replies)
        prompts: dict[str, Rendered] = {reply.prompt.id: reply.rendered for reply in replies}
        order = {item: row for row, item in enumerate(prompts)}
        longest = max(len(prompt.token_ids) for prompt in prompts.values())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask: Bool[Tensor, "batch column"] = torch.zeros(
            len(prompts), longest, dtype=torch.bool, device=model.device
        )
        for row, prompt in enumerate(prompts.values()):
            ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            self.mask[row, longest - len(prompt.token_ids) :] = True
        starts = [prompt.generation_prompt_start for prompt in prompts.values()]
        self.positions = Positions(
            model.marks, [len(prompt.token_ids) for prompt in prompts.values()], starts, model.device
        )
        self.cache = RowCache(model.anatomy.linear_layers, model.anatomy.layers)
        self.last = {"logits_to_keep": 1} if _keeps_last(type(model.hf)) else {}
        self.logits: Float[Tensor, "batch vocab"] = self._forward(ids.to(model.device))
        for routes in model.routes:
            routes.begin([reply.key for reply in self.replies], list(prompts), self.mask)
        if len(prompts) < len(self.replies):
            self._take(torch.tensor([order[reply.prompt.id] for reply in self.replies], device=model.device), 0)

    def __len__(self) -> int:
        return len(self.replies)

    def _forward(self, ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch vocab"]:
        hf = self.model.hf
        place = (self.mask.long().cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        with self.model.at(self.positions):
            out = hf(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=place,
                past_key_values=self.cache,
                use_cache=True,
                **self.last,
            )
        logits: Tensor = out.logits[:, -1]
        return logits.to(self.model.device)

    def step(self, tokens: Int[Tensor, " batch"]) -> None:
        """Read one token per row; rows whose reply has ended read padding."""
        running = torch.tensor([reply.finish is None for reply in self.replies], device=self.mask.device)
        self.mask = torch.cat([self.mask, running[:, None]], 1)
        self.logits = self._forward(tokens[:, None])
        for routes in self.model.routes:
            routes.step([reply.key if reply.finish is None else None for reply in self.replies])

    def _take(self, rows: Int[Tensor, " kept"], skip: int) -> None:
        self.mask = self.mask.index_select(0, rows)[:, skip:]
        self.logits = self.logits.index_select(0, rows)
        self.positions.select(rows)
        self.cache.select(rows, skip)

    def drop_finished(self) -> None:
        """Let the rows go whose reply has ended, and the columns that no other row uses; at least one must be left."""
        kept = [row for row, reply in enumerate(self.replies) if reply.finish is None]
        rows = torch.tensor(kept, device=self.mask.device)
        self._take(rows, int(self.mask.index_select(0, rows).any(0).int().argmax()))
        self.replies = [self.replies[row] for row in kept]

    def join(self, other: Batch) -> None:
        """Put the rows of `other` behind these."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        left = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask = torch.cat(left)
        self.logits = torch.cat([self.logits, other.logits])
        self.positions.join(other.positions)
        self.cache.join(other.cache)
        self.replies += other.replies

    def uniform(self) -> Float[Tensor, " batch"]:
        """Each row's random number for its next token; 0 for rows that have ended."""
        numbers = [
            float(reply.uniforms[len(reply.tokens)]) if len(reply.tokens) < len(reply.uniforms) else 0.0
            for reply in self.replies
        ]
        return torch.tensor(numbers, dtype=torch.float64, device=self.logits.device)

    def policy_rows(self) -> PolicyRows:
        """What a think policy sees."""
        state, device = self.positions.state, self.logits.device
        states = state.current()
        thinking = torch.where(
            states == State.THINKING, state.count - state.thought_start, torch.zeros_like(state.count)
        )
        recent = torch.full((len(self), REMEMBERED), -1, dtype=torch.long)
        for row, reply in enumerate(self.replies):
            last = ((*reply.rendered.token_ids[-REMEMBERED:], *reply.tokens))[-REMEMBERED:]
            recent[row, REMEMBERED - len(last) :] = torch.tensor(last)
        return PolicyRows(
            items=tuple(reply.prompt.id for reply in self.replies),
            samples=tuple(reply.sample for reply in self.replies),
            states=states,
            generated=torch.tensor([len(reply.tokens) for reply in self.replies], device=device),
            thinking=thinking,
            forced_run=torch.tensor([reply.forced_run for reply in self.replies], device=device),
            last_tokens=recent.to(device),
            replies=tuple(reply.tokens for reply in self.replies),
        )
