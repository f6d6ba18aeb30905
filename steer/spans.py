"""Spans: which positions of a finished trace a probe averages over (DESIGN §2); they may look ahead.

With an opening mark at tokens o1..o2 and its closing at c1..c2, the first such block, T tokens in all, P of them prompt:

| span | positions |
|---|---|
| `thinking` | [o1, c2 + 1): the thought as input, marks included |
| `predicts_thinking` | [o1 - 1, c2): the positions whose logits are those tokens (ThinkEdit's choice) |
| `last_prompt_token` | P - 1 |
| `last_token` | T - 1, or T - 2 where the reply ended by itself: its last token before the end token |
| `answer` | [c2 + 1, T): all after the thought; without a closed thought the grader's `answer_span` |
| `before_answer` | [P, start of `answer_span`): all generated before the final answer; to T where none was found |
| `marker:<text>[,<text>…][@prompt or @all][#n]` | where a marker is the input token, its last one if it has several; inside the thinking, the prompt, or anywhere; the n-th such place (from 1) with `#n` |

An unclosed thought runs to T; whether to use it is the caller's choice (`Trace.closed`). A span that a trace does not
have is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from steer.errors import SteerError
from steer.marks import Ids, Marks
from steer.trace import Trace, decode

SPANS = ("thinking", "predicts_thinking", "last_prompt_token", "last_token", "answer", "before_answer")
NEEDS_MARKS = ("thinking", "predicts_thinking")
_MARKER = re.compile(r"marker:(?P<texts>.+?)(?:@(?P<where>prompt|all))?(?:#(?P<nth>\d+))?", re.DOTALL)
SPACES = ("", "▁", "Ġ", "Ċ")  # How vocabularies write no space, a space (two ways) and a line's end before a word.


@dataclass(frozen=True)
class Marker:
    """A parsed `marker:` span.

    Attributes:
        texts: any of these; each is found with and without a space before it.
        where: "thinking", "prompt" or "all".
        nth: only the n-th place, from 1; None for every place.
    """

    texts: tuple[str, ...]
    where: str = "thinking"
    nth: int | None = None


def parse_marker(span: str) -> Marker:
    """Read `marker:<text>[,<text>…][@prompt|@all][#n]`.

    Raises:
        SteerError: no text, an empty one between commas, or `#0`.
    """
    found = _MARKER.fullmatch(span)
    texts = tuple(found["texts"].split(",")) if found else ()
    nth = int(found["nth"]) if found and found["nth"] else None
    if found is None or not all(text.strip() for text in texts) or nth == 0:
        raise SteerError(
            f"the span {span!r} cannot be read",
            "marker:<text>[,<text>…][@prompt or @all][#n], n from 1",
            "For example marker:;@all#2",
        )
    return Marker(texts, found["where"] or "thinking", nth)


def check_span(span: str) -> None:
    """Refuse a span that does not exist.

    Raises:
        SteerError: an unknown name or an unreadable marker.
    """
    if span.startswith("marker:"):
        parse_marker(span)
    elif span not in SPANS:
        raise SteerError(f"there is no span {span!r}", f"one of {', '.join(SPANS)} or marker:<text>")


def span_positions(span: str, trace: Trace, marks: Marks, tokenizer: Any = None) -> list[int]:
    """Positions of a span in prompt + completion, rising; empty where the trace does not have it.

    Args:
        span: a name from the table above.
        trace: the finished trace.
        marks: the run's marks; only asked whether there are any.
        tokenizer: needed for `marker:` spans.

    Raises:
        SteerError: an unknown span, a thinking span of a model without marks, a marker without a tokenizer, or one that
            the tokenizer cannot write.
    """
    check_span(span)
    total, prompt = len(trace.tokens), trace.prompt_length
    thinking = trace.thinking_span
    if span in NEEDS_MARKS and not marks.exist and thinking is None:
        raise SteerError(
            f"the span {span!r} needs marks around the thinking, and this run has none",
            "",
            "Use before_answer, or give the marks the model writes",
        )
    if span.startswith("marker:"):
        return _marker_positions(parse_marker(span), trace, tokenizer)
    if span == "last_prompt_token":
        return [prompt - 1] if prompt else []
    if span == "last_token":
        return [max(total - (2 if trace.finish_reason == "stop" else 1), prompt - 1, 0)] if total else []
    if span == "before_answer":
        return list(range(prompt, total if trace.answer_span is None else max(trace.answer_span[0], prompt)))
    if span == "answer":
        after = (thinking[1], total) if thinking is not None and trace.closed else trace.answer_span
        return [] if after is None else list(range(*after))
    if thinking is None:
        return []
    back = 1 if span == "predicts_thinking" else 0
    return list(range(max(thinking[0] - back, 0), thinking[1] - back))


def _marker_positions(marker: Marker, trace: Trace, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise SteerError("a marker span was asked for without a tokenizer", "", "Pass tokenizer=model.tokenizer")
    if marker.where == "thinking":
        if trace.thinking_span is None:
            return []
        start, end = trace.thinking_span
    else:
        start, end = 0, trace.prompt_length if marker.where == "prompt" else len(trace.tokens)
    tokens = trace.tokens
    places = {
        last
        for text in marker.texts
        for ids in marker_ids(text, tokenizer)
        for last in range(start + len(ids) - 1, end)
        if tokens[last] == ids[-1] and tokens[last - len(ids) + 1 : last + 1] == ids
    }
    found = sorted(places)
    return found if marker.nth is None else found[marker.nth - 1 : marker.nth]


def marker_ids(text: str, tokenizer: Any) -> tuple[Ids, ...]:
    """The token sequences that write `text`, with and without a space before it.

    Raises:
        SteerError: the tokenizer cannot write it.
    """
    found = marker_variants(text, tokenizer)
    if not found:
        raise SteerError(
            f"this model's tokenizer cannot write the marker {text!r}",
            "a text made of its tokens",
            "Choose a word that stands in the traces",
        )
    return found


@lru_cache(maxsize=256)
def marker_variants(text: str, tokenizer: Any) -> tuple[Ids, ...]:
    """As `marker_ids`, empty where the tokenizer cannot write it."""
    unknown = tokenizer.unk_token_id
    bare = text.strip()
    vocabulary = tokenizer.get_vocab()
    found: set[Ids] = {(int(vocabulary[space + bare]),) for space in SPACES if space + bare in vocabulary}
    for written in (text, bare, f" {bare}"):
        ids = tuple(int(token) for token in tokenizer(written, add_special_tokens=False)["input_ids"])
        if ids and unknown not in ids and decode(tokenizer, ids).strip() == bare:
            found.add(ids)
    return tuple(sorted(found))
