"""Policies as the command line writes them."""

from __future__ import annotations

from typing import Any

from experiments.think_policies.budget import ThinkingBudget
from steer.errors import SteerError
from steer.marks import Marks
from steer.policy import Policy

FORMS = "budget:N or budget:N:TEXT (close a thought after N tokens, writing TEXT first)"


def parse_policy(text: str, marks: Marks, tokenizer: Any = None) -> Policy:
    """Read `budget:N` or `budget:N:TEXT`.

    Args:
        text: as written after `--policy`.
        marks: the model's.
        tokenizer: encodes an end text.

    Raises:
        SteerError: no such policy, or N is no whole number.
    """
    kind, _, options = text.partition(":")
    number, colon, end_text = options.partition(":")
    if kind != "budget" or not number.strip().isdecimal():
        raise SteerError(f"there is no policy {text!r}", FORMS, "For example --policy budget:64")
    return ThinkingBudget.of(int(number), marks, end_text if colon else None, tokenizer)
