"""Which traces are read, and at which positions: those whose logits predict the tokens of a part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steer.errors import SteerError
from steer.spans import span_positions
from steer.trace import Trace

if TYPE_CHECKING:
    from steer.model import SteerableModel

Thought = Literal["thinking", "before_answer"]
FIRST, THINKING, ANSWER = PARTS = ("first token", "thinking", "answer")
TOO_LONG, NOTHING = "longer than the model or max_tokens allows", "without a generated token"
Where = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Chosen:
    """What will be read of a run.

    Attributes:
        traces: sorted by id.
        where: per trace the positions of each part, rising; empty where it lacks the part.
        left_out: reason -> how many traces.
    """

    traces: tuple[Trace, ...]
    where: tuple[Where, ...]
    left_out: Mapping[str, int]

    def batches(self, batch_tokens: int) -> Iterator[list[int]]:
        """Cut the traces, by their place, into batches of nearly equal length, at most `batch_tokens` with padding each."""
        batch: list[int] = []
        for place in sorted(range(len(self.traces)), key=lambda place: len(self.traces[place].tokens)):
            if batch and len(self.traces[place].tokens) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch


def choose(
    model: SteerableModel,
    traces: Sequence[Trace],
    thought: Thought,
    max_tokens: int | None,
    what: str,
    required: bool = True,
) -> Chosen:
    """Choose the traces that can be read and find their parts.

    Args:
        model: that will read them.
        traces: in any order.
        thought: where the thinking is.
        max_tokens: longest trace to read; the model's own limit holds as well.
        what: the run, as the reader calls it.
        required: whether one trace at least must have a thought.

    Raises:
        SteerError: no trace is left or none has a thought though it is required, a token id lies outside the vocabulary, two traces share an id.
    """
    limit = min(max_tokens or math.inf, model.longest or math.inf)
    left_out: Counter[str] = Counter()
    found: list[tuple[Trace, Where]] = []
    for trace in sorted(traces, key=lambda trace: trace.id):
        if found and found[-1][0].id == trace.id:
            raise SteerError(
                f"two traces of {what} have the id {trace.id!r}", "ids that differ", "Join runs under new ids"
            )
        if max(trace.tokens, default=0) >= model.anatomy.vocab:
            raise SteerError(
                f"trace {trace.id!r} of {what} has the token id {max(trace.tokens)}",
                f"ids below {model.anatomy.vocab}, this model's vocabulary",
                "Generate the traces with this model, or rebuild them from text with steer.traces.from_text",
            )
        reason = TOO_LONG if len(trace.tokens) > limit else None if trace.completion_token_ids else NOTHING
        if reason is not None:
            left_out[reason] += 1
        else:
            found.append((trace, places_of(model, trace, thought)))
    if required and not any(len(where[THINKING]) for _, where in found):
        left = f" ({', '.join(f'{count} {reason}' for reason, count in left_out.items())})" if left_out else ""
        raise SteerError(
            f"of {len(traces)} traces of {what} none has a thought that can be read{left}",
            "at least one with an opening mark",
            "Give traces of a model that thinks; for one that thinks without marks, read what stands before the answer: thought='before_answer' (--thought before_answer)",
        )
    return Chosen(tuple(trace for trace, _ in found), tuple(where for _, where in found), dict(left_out))


def places_of(model: SteerableModel, trace: Trace, thought: Thought) -> Where:
    """Return the positions whose logits predict the tokens of each part; only tokens that were generated count."""
    first = trace.prompt_length - 1

    def before(span: str) -> list[int]:
        return [place - 1 for place in span_positions(span, trace, model.marks, model.tokenizer) if place > first]

    return {FIRST: [first], THINKING: before(thought), ANSWER: before("answer")}
