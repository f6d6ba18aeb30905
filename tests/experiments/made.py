"""Graded replies made by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.run import Run
from experiments.summary import Replies, summarise
from steer.marks import Marks
from steer.trace import Trace
from steer.traces import Traces

MARKS = Marks(((3,),), ((4,),))


def trace(
    item: str,
    sample: int,
    length: int | None,
    answer: str | None,
    correct: bool,
    *,
    closed: bool = True,
    group: str = "g",
) -> Trace:
    """A reply whose thought has `length` tokens (if it is not closed, all tokens), or that has no thought."""
    completion = tuple(range(20, 20 + (length or 0) + 3))
    span = None if length is None else (2, 2 + length if closed else 2 + len(completion))
    return Trace(
        f"{item}/{sample}",
        item,
        sample,
        "p",
        (10, 11),
        completion,
        thinking_span=span,
        closed=None if span is None else closed,
        thinking_tokens=None if span is None else span[1] - span[0],
        answer=answer,
        gold="1",
        correct=correct,
        finish_reason="stop" if closed else "length",
        group=group,
    )


def run(lengths: Sequence[int | None], correct: Sequence[bool], short_below: Mapping[str, int] | None = None) -> Run:
    """A run of one reply per question; a thought without a length never closes."""
    rows = [
        trace(f"q{n:03d}", 0, length or 50, "1" if right else "2", right, closed=length is not None)
        for n, (length, right) in enumerate(zip(lengths, correct, strict=True))
    ]
    thresholds = dict(short_below or {})
    summary = summarise(Replies.of(rows, MARKS, thresholds))
    return Run(Path("made"), Traces(rows, {"marks": MARKS.to_dict()}), summary, thresholds)
