"""A thinking budget: a thought that has used up its tokens is closed by force.

Tokens are counted as in `Trace.thinking_span` so far: the opening mark counts. When `tokens` of them stand, an end text
(if any) and the closing mark are written, token by token; what follows is sampled as usual. So a thought never has more
than `tokens` + the tokens of the end text and the closing mark, and thoughts that end before are not touched. vLLM has
the same under the name `thinking_token_budget`; with an end text it is the truncation of "budget forcing" (s1,
arXiv 2501.19393, §3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.marks import Marks
from steer.phases import State
from steer.policy import Decision, PolicyRows


@dataclass(frozen=True)
class ThinkingBudget:
    """Close a thought after `tokens` tokens.

    Attributes:
        tokens: of the thought, its opening mark included, before the end is forced; at least 1.
        ending: token ids to force: the end text's and the closing mark's.
        end_text: written before the closing mark, for the reader.

    Raises:
        SteerError: a budget below 1, or nothing to force.
    """

    tokens: int
    ending: tuple[int, ...] = field(repr=False)
    end_text: str | None = None
    needs_marks = True

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SteerError(
                f"the thinking budget is {self.tokens}",
                "1 token or more",
                "To forbid thinking, use the template's switch",
            )
        if not self.ending:
            raise SteerError("a thinking budget has no closing mark to force", "a model with marks around its thinking")

    @classmethod
    def of(cls, tokens: int, marks: Marks, end_text: str | None = None, tokenizer: Any = None) -> ThinkingBudget:
        """The budget for a model, with the first of its closing marks.

        Args:
            tokens: the budget.
            marks: the model's.
            end_text: written before the closing mark, for example "Time is up."
            tokenizer: encodes `end_text`.

        Raises:
            SteerError: the model has no marks, or there is an end text and no tokenizer.
        """
        if not marks.exist:
            raise SteerError(
                "a thinking budget needs marks around the thinking, and this model's tokenizer has none",
                "",
                "Limit the whole reply with --max-new-tokens",
            )
        if end_text is not None and tokenizer is None:
            raise SteerError(
                "a thinking budget has an end text but no tokenizer to encode it",
                "ThinkingBudget.of(..., tokenizer=model.tokenizer)",
            )
        text: Sequence[int] = [] if end_text is None else tokenizer(end_text, add_special_tokens=False)["input_ids"]
        return cls(tokens, (*map(int, text), *marks.closing[0]), end_text)

    @property
    def name(self) -> str:
        """`budget:N`, with the end text if there is one."""
        return f"budget:{self.tokens}" if self.end_text is None else f"budget:{self.tokens}:{self.end_text}"

    def __call__(self, rows: PolicyRows, logits: Float[Tensor, "batch vocab"]) -> Decision:
        """Force the next token of the ending in every row whose thought has used its budget.

        A row that is being forced is still thinking until the closing mark's last token, so the number of tokens
        forced in a row tells which one is next.
        """
        over = (rows.states == State.THINKING) & (rows.thinking >= self.tokens)
        ending = torch.tensor(self.ending, device=rows.thinking.device)
        following = ending[rows.forced_run.clamp(max=len(self.ending) - 1)]
        return Decision(forced=torch.where(over, following, torch.full_like(following, -1)))
