"""A thinking budget in vLLM: `thinking_token_budget` where it does what `budget:N` does, and refusals where it does not.

Both close a thought by force once N of its tokens stand, and both give every thought of a reply the same budget. vLLM
does not count the opening mark, so it is told N - 1. It looks for its marks anywhere in the prompt, ours count from where
the reply's turn begins; and a closing mark outside of a thought leaves it believing in a thought that never ends. The
first is refused before, the second after the reply is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from steer.errors import SteerError
from steer.marks import Marks
from steer.phases import find_events
from steer.policy import Policy

REMEDY = "Use the HF back end: leave out vllm: (or use steer.load)"


def budget_of(policy: Policy | None, marks: Marks, simple: bool) -> int | None:
    """Return N of `budget:N`; None without a policy.

    Args:
        policy: as the HF back end takes it.
        marks: of the tokenizer.
        simple: whether the engine was started with the same two marks.

    Raises:
        SteerError: another policy, or marks that vLLM cannot be given.
    """
    if policy is None:
        return None
    found = re.fullmatch(r"budget:(\d+)", policy.name)
    if found is None:
        raise SteerError(f"vLLM cannot run the think policy {policy.name}", "budget:N, or none", REMEDY)
    if not simple:
        counted = f"{len(marks.opening)} opening and {len(marks.closing)} closing marks" if marks.exist else "no marks"
        raise SteerError(
            f"the policy {policy.name} needs marks that vLLM counts as we do, and this tokenizer has {counted}",
            "one opening and one closing mark, of one token each",
            REMEDY,
        )
    return int(found[1])


def check_prompt(item: str, token_ids: Sequence[int], start: int, marks: Marks) -> None:
    """Refuse a prompt in which vLLM would see another thought than we do.

    Raises:
        SteerError: it has a mark before `start` that vLLM counts and we do not, or several opening marks.
    """
    (opening,), (closing,) = marks.opening[0], marks.closing[0]
    last = {token: max((at for at, each in enumerate(token_ids) if each == token), default=-1) for token in (opening, closing)}  # fmt: skip
    theirs = last[opening] if last[opening] > last[closing] else None
    ours = None
    for event in find_events(token_ids, marks, start):
        ours = (event.start if ours is None else ours) if event.opens else None
    if ours != theirs:
        raise SteerError(
            f"prompt {item} has marks around thinking in its text, and vLLM's budget would count from another one than ours",
            "a prompt whose only marks are those that the template appends for the reply",
            REMEDY,
        )


def forced(item: str, tokens: Sequence[int], length: int, start: int, marks: Marks, budget: int) -> tuple[int, ...]:
    """Return which tokens of a reply the budget wrote, as indices into it.

    Args:
        item: for the message.
        tokens: prompt and reply.
        length: of the prompt.
        start: first token at which a mark counts.
        marks: one of each, of one token.
        budget: N.

    Raises:
        SteerError: vLLM did not act as our budget does.
    """
    closing = marks.closing[0][0]
    events = {event.end: event for event in find_events(tokens, marks, start)}
    found, thought, stray = [], None, False
    for index, token in enumerate(tokens):
        if index >= length and thought is not None and index - thought >= budget:
            if token != closing:
                raise SteerError(f"vLLM let the thought of reply {item} run over its budget of {budget} tokens", "a closing mark there", REMEDY)  # fmt: skip
            found.append(index - length)
        event = events.get(index)
        if event is None:
            continue
        if event.opens and stray:
            raise SteerError(
                f"reply {item} closes a thought that it had not opened and then opens one, which vLLM's budget does not count as ours does",
                "marks in pairs",
                REMEDY,
            )
        stray = stray or (not event.opens and thought is None and index >= length)
        thought = (event.start if thought is None else thought) if event.opens else None
    return tuple(found)
