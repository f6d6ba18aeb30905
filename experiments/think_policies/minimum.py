"""A minimum of thinking: a thought cannot be closed before it has so many tokens.

Tokens are counted as by `budget`: the opening mark counts. Below `tokens` of them the closing mark is banned, and with it
the end of the reply. What "budget forcing" (s1, arXiv 2501.19393, §3.1) does to lengthen a thought, without the word that
it writes instead of the mark. Of a mark of several tokens the one is banned by which it differs from every opening mark,
where the tokens before it stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.marks import Ids, Marks
from steer.phases import State
from steer.policy import REMEMBERED, Decision, PolicyRows


@dataclass(frozen=True)
class MinimumThinking:
    """Keep a thought open until it has `tokens` tokens.

    Attributes:
        tokens: of the thought, its opening mark included, before it may close; at least 1.
        closings: starts of the closing marks, up to the token that is banned.
        ends: tokens that end a reply, banned as well.

    Raises:
        SteerError: a minimum below 1, or no closing mark.
    """

    tokens: int
    closings: tuple[Ids, ...] = field(repr=False)
    ends: tuple[int, ...] = field(default=(), repr=False)
    needs_marks = True

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SteerError(f"the least length of a thought is {self.tokens}", "1 token or more")
        if not self.closings:
            raise SteerError(
                "a minimum of thinking has no closing mark to ban", "a model with marks around its thinking"
            )

    @classmethod
    def of(cls, tokens: int, marks: Marks, ends: Sequence[int] = ()) -> MinimumThinking:
        """The minimum for a model.

        Args:
            tokens: the minimum.
            marks: the model's.
            ends: tokens that end a reply.

        Raises:
            SteerError: the model has no marks.
        """
        return cls(tokens, tuple(dict.fromkeys(_telling(mark, marks) for mark in marks.closing)), tuple(ends))

    @property
    def name(self) -> str:
        """`min:N`."""
        return f"min:{self.tokens}"

    def __call__(self, rows: PolicyRows, logits: Float[Tensor, "batch vocab"]) -> Decision:
        """Ban what would close or end a thought that is too short."""
        short = (rows.states == State.THINKING) & (rows.thinking < self.tokens)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        for *before, token in self.closings:
            begun = short
            if before:
                wanted = torch.tensor(before, device=rows.last_tokens.device)
                begun = short & (rows.last_tokens[:, REMEMBERED - len(before) :] == wanted).all(1)
            banned[:, token] |= begun.to(banned.device)
        for token in self.ends:
            banned[:, token] |= short.to(banned.device)
        return Decision(banned=banned)


def _telling(mark: Ids, marks: Marks) -> Ids:
    """The start of a closing mark up to the first token at which no opening mark goes on like it."""
    for length in range(1, len(mark)):
        if all(opening[:length] != mark[:length] for opening in marks.opening):
            return mark[:length]
    return mark
