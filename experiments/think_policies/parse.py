"""Policies as the command line writes them; a policy's `name` is such a text, so that a run can be asked again."""

from __future__ import annotations

from typing import Any

from experiments.think_policies.budget import ThinkingBudget
from experiments.think_policies.minimum import MinimumThinking
from experiments.think_policies.switching import WORDS, SwitchPenalty
from steer.errors import SteerError
from steer.marks import Marks
from steer.policy import Policy

FORMS = (
    "budget:N or budget:N:TEXT (close a thought after N tokens, writing TEXT first), min:N (keep it open for N tokens), "
    "tip:ALPHA:STEPS or tip:ALPHA:STEPS:WORD,WORD (make words that begin another thought less likely)"
)


def parse_policy(text: str, marks: Marks, tokenizer: Any = None) -> Policy:
    """Read `budget:N[:TEXT]`, `min:N` or `tip:ALPHA:STEPS[:WORD,WORD]`.

    Args:
        text: as written after `--policy`.
        marks: the model's.
        tokenizer: encodes an end text and switch words, and says how a reply ends.

    Raises:
        SteerError: no such policy, or its numbers are none.
    """
    kind, _, options = text.partition(":")
    number, colon, rest = options.partition(":")
    if kind == "budget" and number.strip().isdecimal():
        return ThinkingBudget.of(int(number), marks, rest if colon else None, tokenizer)
    if kind == "min" and number.strip().isdecimal() and not colon:
        end = getattr(tokenizer, "eos_token_id", None)
        return MinimumThinking.of(int(number), marks, () if end is None else (int(end),))
    steps, comma, words = rest.partition(":")
    if kind == "tip" and _is_number(number) and steps.strip().isdecimal():
        named = tuple(words.split(",")) if comma else WORDS
        return SwitchPenalty.of(marks, tokenizer, float(number), int(steps), named)
    raise SteerError(f"there is no policy {text!r}", FORMS, "For example --policy budget:64")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
