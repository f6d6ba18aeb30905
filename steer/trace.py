"""A trace: one prompt with one reply, a line of a run folder's `traces.jsonl` (DESIGN §5).

Positions (`thinking_span`, `answer_span`, `generation_prompt_start`) count tokens of prompt + completion; `forced`
counts tokens of the completion. Spans are half open, marks included. What a trace does not have is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from steer.errors import SteerError
from steer.identity import canonical
from steer.marks import Marks
from steer.phases import find_events
from steer.prompts import RawText

Span: TypeAlias = tuple[int, int]
FinishReason: TypeAlias = Literal["stop", "length", "policy"]
FINISH_REASONS = ("stop", "length", "policy")


@dataclass(frozen=True)
class Trace:
    """One prompt with one reply.

    Attributes:
        id: `item/sample`.
        item, sample: which question, and which of its replies (from 0).
        prompt: raw text or chat messages.
        prompt_token_ids, completion_token_ids: the tokens; the end token, if one came, is the completion's last.
        text: the completion as text, marks kept, the end token left out.
        thinking_span: the first thought, marks included; an unclosed one runs to the end; None without a thought.
        closed: whether that thought has its closing mark; None without a thought.
        thinking_tokens: end - start of `thinking_span`, or None.
        answer_span: where the final answer stands, told by the grader; None if it found none.
        answer_tokens: tokens after a closed thought, the end token included; None without one.
        forced: indices into `completion_token_ids` that a policy wrote.
        answer, gold, correct: what the grader read, what is right, and whether they agree.
        finish_reason: "stop" (an end token), "length" or "policy"; None where the text came from elsewhere.
        group: items of equal size or difficulty share it.
        generation_prompt_start: first token at which a mark counts (start of what the chat template appends).

    Raises:
        SteerError: a span or index lies outside the tokens, or the counts contradict the spans.
    """

    id: str
    item: str
    sample: int
    prompt: str | list[dict[str, Any]]
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    text: str = ""
    thinking_span: Span | None = None
    closed: bool | None = None
    thinking_tokens: int | None = None
    answer_span: Span | None = None
    answer_tokens: int | None = None
    forced: tuple[int, ...] = ()
    answer: str | None = None
    gold: str | None = None
    correct: bool | None = None
    finish_reason: FinishReason | None = None
    group: str | None = None
    generation_prompt_start: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):  # So that replying to it again does not wrap it in the chat template.
            object.__setattr__(self, "prompt", RawText(self.prompt))
        total = len(self.prompt_token_ids) + len(self.completion_token_ids)
        for name, span in (("thinking_span", self.thinking_span), ("answer_span", self.answer_span)):
            if span is not None and not 0 <= span[0] <= span[1] <= total:
                raise SteerError(
                    f"trace {self.id!r} has the {name} {list(span)}, outside its {total} tokens",
                    "0 <= start <= end <= tokens",
                )
        if any(not 0 <= index < len(self.completion_token_ids) for index in self.forced):
            raise SteerError(
                f"trace {self.id!r} has forced tokens at {list(self.forced)}",
                f"indices into its {len(self.completion_token_ids)} completion tokens",
            )
        expected = None if self.thinking_span is None else self.thinking_span[1] - self.thinking_span[0]
        if self.thinking_tokens != expected or (self.closed is None) != (expected is None):
            found = (
                f"thinking_span {self.thinking_span}, closed {self.closed} and thinking_tokens {self.thinking_tokens}"
            )
            raise SteerError(
                f"trace {self.id!r} has {found}", "thinking_tokens = end - start, and all three null together"
            )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_token_ids + self.completion_token_ids

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def thought_length(self) -> int:
        """Length of thought in tokens: `thinking_tokens`, else those before `answer_span`, else the completion."""
        if self.thinking_tokens is not None:
            return self.thinking_tokens
        if self.answer_span is not None:
            return max(self.answer_span[0] - self.prompt_length, 0)
        return len(self.completion_token_ids)


NAMES = tuple(field.name for field in fields(Trace))
REQUIRED = ("id", "item", "sample", "prompt", "prompt_token_ids", "completion_token_ids")


def thought(tokens: Sequence[int], marks: Marks, marks_from: int) -> tuple[Span, bool] | None:
    """The first thought of a sequence, [start, end) with its marks, and whether it is closed."""
    events = find_events(tokens, marks, marks_from)
    opening = next((event for event in events if event.opens), None)
    if opening is None:
        return None
    closing = next((event for event in events if not event.opens and event.end > opening.end), None)
    return (opening.start, len(tokens) if closing is None else closing.end + 1), closing is not None


def make_trace(
    *,
    item: str,
    sample: int,
    prompt: str | Sequence[Mapping[str, Any]],
    prompt_token_ids: Sequence[int],
    completion_token_ids: Sequence[int],
    tokenizer: Any,
    marks: Marks,
    generation_prompt_start: int = 0,
    finish_reason: FinishReason | None = None,
    forced: Sequence[int] = (),
    gold: str | None = None,
    group: str | None = None,
) -> Trace:
    """A trace with its text and its thinking filled in; grading comes later.

    Args:
        item: which question.
        sample: which of its replies, from 0.
        prompt: raw text or chat messages.
        prompt_token_ids: as the model read them.
        completion_token_ids: with the end token where `finish_reason` is "stop".
        tokenizer: decodes the completion.
        marks: find the thought.
        generation_prompt_start: first token at which a mark counts.
        finish_reason: why the reply ended; None if unknown.
        forced: indices into the completion that a policy wrote.
        gold: the right answer.
        group: items of equal size or difficulty share it.
    """
    tokens = (*prompt_token_ids, *completion_token_ids)
    found = thought(tokens, marks, generation_prompt_start)
    span, closed = found if found is not None else (None, None)
    spoken = completion_token_ids[:-1] if finish_reason == "stop" else completion_token_ids
    return Trace(
        id=f"{item}/{sample}",
        item=item,
        sample=sample,
        prompt=prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        prompt_token_ids=tuple(prompt_token_ids),
        completion_token_ids=tuple(completion_token_ids),
        text=decode(tokenizer, spoken),
        thinking_span=span,
        closed=closed,
        thinking_tokens=None if span is None else span[1] - span[0],
        answer_tokens=len(tokens) - span[1] if span is not None and closed else None,
        forced=tuple(forced),
        gold=gold,
        finish_reason=finish_reason,
        group=group,
        generation_prompt_start=generation_prompt_start,
    )


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of these tokens, special ones kept and spaces as they are."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_span(trace: Trace, tokenizer: Any, start: int, end: int) -> Span:
    """From characters [start, end) of `trace.text` to the tokens of prompt + completion that write them.

    A token that writes only the space before the first character is left out; one that writes any part of the
    characters is in.
    """

    def written(tokens: int) -> int:
        return len(decode(tokenizer, trace.completion_token_ids[:tokens]))

    def first(reached: int) -> int:
        low, high = 0, len(trace.completion_token_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if written(middle) >= reached else (middle + 1, high)
        return low

    return trace.prompt_length + max(first(start + 1) - 1, 0), trace.prompt_length + first(end)


def trace_line(trace: Trace) -> str:
    """The trace as one line of canonical JSON, without the line's end."""
    line = canonical(asdict(trace))
    if any(
        "\ud800" <= character <= "\udfff" for character in line
    ):  # Half a surrogate pair has no UTF-8; write it as an escape.
        return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in line)
    return line
