"""Think policies: what the sampler may do to the thinking, token by token.

A policy sees, before each token is sampled, the state of every row and its logits, and answers with a `Decision`. It
keeps no state of its own between calls: all it needs is in `PolicyRows`, so that rows may enter and leave the batch and
a resumed run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.errors import SteerError
from steer.marks import Marks

REMEMBERED = 32


@dataclass(frozen=True)
class PolicyRows:
    """The rows of a batch before a token is sampled.

    Attributes:
        items, samples: which reply each row is.
        states: `State` of the last token read.
        generated: tokens of the reply so far.
        thinking: tokens of the thought now running, its opening mark included; 0 outside a thought.
        forced_run: how many tokens up to now the policy has forced in a row.
        last_tokens: the last 32 tokens of prompt and reply, newest last; -1 before the first.
        replies: all tokens of each reply so far, to be read alone.
    """

    items: tuple[str, ...]
    samples: tuple[int, ...]
    states: Int[Tensor, " batch"]
    generated: Int[Tensor, " batch"]
    thinking: Int[Tensor, " batch"]
    forced_run: Int[Tensor, " batch"]
    last_tokens: Int[Tensor, "batch remembered"]
    replies: tuple[Sequence[int], ...]


@dataclass(frozen=True)
class Decision:
    """What a policy wants; what is None is left to the sampler.

    Attributes:
        forced: the token to write, -1 where the sampler chooses.
        banned: True at tokens that must not be sampled; every row needs one token left.
        stop: True where the reply ends here, before another token (finish reason "policy").
        added: finite numbers that are added to the logits before the sampler's temperature.
    """

    forced: Int[Tensor, " batch"] | None = None
    banned: Bool[Tensor, "batch vocab"] | None = None
    stop: Bool[Tensor, " batch"] | None = None
    added: Float[Tensor, "batch vocab"] | None = None


class Policy(Protocol):
    """A think policy; `name` identifies it with its options in run.yaml, for example "budget:64"."""

    @property
    def name(self) -> str:
        """Name and options."""
        ...

    def __call__(self, rows: PolicyRows, logits: Float[Tensor, "batch vocab"]) -> Decision:
        """Decide the next token of every row; `logits` must not be changed in place."""
        ...


def check_policy(policy: Policy | None, marks: Marks) -> None:
    """Refuse a policy that acts on thinking where the tokenizer has no marks (`needs_marks = True`).

    Raises:
        SteerError: it needs marks and there are none.
    """
    if policy is not None and getattr(policy, "needs_marks", False) and not marks.exist:
        raise SteerError(
            f"the policy {policy.name} acts on thinking, and this model's tokenizer has no marks around it",
            "a model with marks",
        )


def check_decision(decision: Decision, rows: int, vocab: int) -> None:
    """Refuse a decision of the wrong shape, since it would otherwise be spread over the batch unnoticed.

    Raises:
        ValueError: a shape does not fit, a forced token is outside the vocabulary, or all tokens of a row are banned.
    """
    for name, value, shape in (
        ("forced", decision.forced, (rows,)),
        ("banned", decision.banned, (rows, vocab)),
        ("stop", decision.stop, (rows,)),
        ("added", decision.added, (rows, vocab)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"a policy's {name} has shape {tuple(value.shape)} instead of {shape}")
    if decision.forced is not None and bool(((decision.forced < -1) | (decision.forced >= vocab)).any()):
        raise ValueError(f"a policy forces a token outside the vocabulary of {vocab}")
    if decision.banned is not None and bool(decision.banned.all(-1).any()):
        raise ValueError("a policy bans every token of a row")
    if decision.added is not None and not bool(torch.isfinite(decision.added).all()):
        raise ValueError("a policy adds to logits what is not finite; it bans tokens with `banned`")


def forced_tokens(decision: Decision, rows: int, device: torch.device) -> Int[Tensor, " batch"]:
    """`decision.forced`, or -1 everywhere."""
    if decision.forced is None:
        return torch.full((rows,), -1, dtype=torch.long, device=device)
    return decision.forced.to(device=device, dtype=torch.long)
