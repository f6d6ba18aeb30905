"""Prompts: from text or chat messages to token ids, and where the reply's turn starts in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2

from steer.errors import SteerError
from steer.marks import Marks

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Content: TypeAlias = str | Messages
SWITCHES = ("enable_thinking", "thinking")


class RawText(str):
    """A prompt that is given to the model as it is, without its chat template.

    `generate` takes a plain text for a user's message where the model has a chat template; this says otherwise.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Prompt:
    """Something to reply to.

    Attributes:
        id: names the item; the order of items and their random streams follow from it.
        content: raw text, or chat messages for the model's own template.
        group: items of equal size or difficulty share it.
        gold: the right answer, kept in the trace.
    """

    id: str
    content: Content
    group: str | None = None
    gold: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A prompt as tokens.

    Attributes:
        token_ids: the whole prompt.
        generation_prompt_start: index of the first token at which a mark counts: the start of what the template appends
            for the reply; in raw text 0, or after the last `turn_start`.
    """

    token_ids: tuple[int, ...]
    generation_prompt_start: int


def render(tokenizer: Any, content: Content, thinking: bool | None = None, marks: Marks | None = None) -> Rendered:
    """Turn a prompt into tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        content: raw text (encoded with the tokenizer's own special tokens) or chat messages.
        thinking: None leaves the template's default; True and False set its own switch.
        marks: only their `turn_start` is used, for raw text.

    Raises:
        SteerError: messages without a template, messages that the template refuses, `thinking` for raw text or for a
            template without a switch, or a prompt without tokens.
    """
    if isinstance(content, str):
        if thinking is not None:
            raise SteerError(
                "thinking was switched, but the prompt is raw text",
                "chat messages",
                "Pass [{'role': 'user', 'content': ...}]",
            )
        ids = tuple(int(token) for token in tokenizer(content)["input_ids"])
        start = 0 if marks is None else marks.raw_text_start(ids)
    else:
        options = {} if thinking is None else {_switch(tokenizer, content): thinking}
        ids = _chat(tokenizer, content, True, options)
        start = _shared(ids, _chat(tokenizer, content, False, options))
    if not ids:
        raise SteerError(
            "a prompt has no tokens",
            "at least one token",
            "This tokenizer adds no first token of its own; give some text",
        )
    return Rendered(ids, start)


def _chat(tokenizer: Any, messages: Messages, for_reply: bool, options: Mapping[str, bool]) -> tuple[int, ...]:
    text = _template(tokenizer, messages, for_reply, options)
    return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def _template(tokenizer: Any, messages: Messages, for_reply: bool, options: Mapping[str, bool]) -> str:
    if tokenizer.chat_template is None:
        raise SteerError(
            "chat messages were given, but this tokenizer has no chat template",
            "raw text prompts",
            "Pass the prompt as a string",
        )
    plain = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=for_reply, **options))
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in plain)
        raise SteerError(
            f"the model's chat template refuses these messages (roles {roles}): {error}", "messages that it accepts"
        ) from error


def _switch(tokenizer: Any, messages: Messages) -> str:
    """The name of the template's switch, found by what it does to these messages."""
    for name in SWITCHES:
        if _template(tokenizer, messages, True, {name: True}) != _template(tokenizer, messages, True, {name: False}):
            return name
    raise SteerError(
        "this model's chat template has no switch for thinking",
        f"a template that reads {' or '.join(SWITCHES)}",
        "Leave the switch out, or ask for short thinking in a system message or with --policy budget:N",
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
