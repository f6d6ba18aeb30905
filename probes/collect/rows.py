"""What a summary knows of a trace or of a group beside its tensors: the columns on which probes choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from steer.errors import SteerError
from steer.identity import known_keys
from steer.traces import Trace


@dataclass(frozen=True)
class Row:
    """One row of every tensor in a summary: a trace, or a group of traces in one shard.

    Attributes:
        id: of the trace, or the label of the group.
        positions: span -> number of token positions (of a group: number of traces that have any).
        traces: how many traces the row stands for.
        item, sample, group, closed, correct, finish_reason: as in `Trace`; null for a group.
        thinking_tokens, answer_tokens, length: tokens in the thought, in the answer, and `Trace.thought_length`.
    """

    id: str
    positions: Mapping[str, int]
    traces: int = 1
    item: str | None = None
    sample: int | None = None
    group: str | None = None
    closed: bool | None = None
    correct: bool | None = None
    finish_reason: str | None = None
    thinking_tokens: int | None = None
    answer_tokens: int | None = None
    length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self) | {"positions": dict(self.positions)}


_NAMES = tuple(field.name for field in fields(Row))


def row_of(trace: Trace, positions: Mapping[str, Sequence[int]]) -> Row:
    """Return the row of a trace."""
    return Row(
        id=trace.id,
        positions={span: len(found) for span, found in positions.items()},
        item=trace.item,
        sample=trace.sample,
        group=trace.group,
        closed=trace.closed,
        correct=trace.correct,
        finish_reason=trace.finish_reason,
        thinking_tokens=trace.thinking_tokens,
        answer_tokens=trace.answer_tokens,
        length=trace.thought_length,
    )


def group_of(label: str, rows: Sequence[Row]) -> Row:
    """Return the row of a group of traces."""
    spans = rows[0].positions
    return Row(label, {span: sum(row.positions[span] > 0 for row in rows) for span in spans}, traces=len(rows))


def parse_rows(stored: object, where: str) -> tuple[Row, ...]:
    """Read what `to_dict` wrote.

    Raises:
        SteerError: something else stands there.
    """
    if not isinstance(stored, list) or not all(isinstance(row, Mapping) for row in stored):
        raise SteerError(f"{where} has no list of rows", "the rows that were written", "Collect again")
    for row in stored:
        known_keys(row, _NAMES, f"a row of {where}")
        if not isinstance(row.get("id"), str) or not isinstance(row.get("positions"), Mapping):
            raise SteerError(f"a row of {where} lacks its id or its positions", "both", "Collect again")
    return tuple(Row(**row) for row in stored)
