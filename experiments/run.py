"""A run folder, read back: what was asked, every graded reply, and what they amount to (DESIGN §5).

`run.yaml` says what was run, `items.jsonl` which questions with which thresholds, `traces.jsonl` the replies in order of
(item, sample), `summary.json` the figures, `journal/` the shards with their timings.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.summary import Replies, Summary
from experiments.tasks.task import Item
from steer.errors import SteerError
from steer.identity import canonical, known_keys
from steer.traces import Traces

ITEMS, SUMMARY = "items.jsonl", "summary.json"
ITEM_KEYS = ("id", "gold", "group", "short_below")


@dataclass(frozen=True)
class Run:
    """A finished evaluation.

    Attributes:
        folder: where it lies.
        traces: graded, in order; `traces.meta` is `run.yaml`.
        summary: the content of `summary.json`.
        short_below: per question, a thought of fewer tokens is short.
    """

    folder: Path
    traces: Traces
    summary: Summary
    short_below: dict[str, int]

    @property
    def replies(self) -> Replies:
        """The traces as a table, for comparisons."""
        return Replies.of(self.traces, self.traces.marks, self.short_below)

    @property
    def accuracy(self) -> float:
        """Share of right replies."""
        return float(self.summary["accuracy"]["value"])

    @property
    def mean_thinking_tokens(self) -> float | None:
        """Mean length of the finished thoughts, marks counted."""
        value = self.summary["thinking_tokens"]["mean"]["value"]
        return None if value is None else float(value)

    def rows(self) -> list[tuple[str, str]]:
        """The figures as label and text."""
        summary = self.summary
        quantiles = summary["thinking_tokens"]["quantiles"]
        rows = [
            ("accuracy", _interval(summary["accuracy"], percent=True)),
            ("questions x samples", f"{summary['questions']} x {summary['samples']}"),
            ("thinking tokens, mean", _interval(summary["thinking_tokens"]["mean"])),
            (
                "median, 10th and 90th percentile",
                ", ".join(f"{quantiles[q]:g}" for q in ("0.5", "0.1", "0.9") if quantiles),
            ),
            ("closed thoughts", _interval(summary["thoughts"]["closed"], percent=True)),
            ("cut off by the token limit", f"{summary['truncated']:.1%}"),
            ("short thoughts", _interval(summary["thoughts"]["short"], percent=True)),
            *(
                (f"accuracy of the shortest {float(share):.0%}", _interval(found, percent=True))
                for share, found in summary["accuracy_of_shortest"].items()
            ),
        ]
        if summary["samples"] > 1:
            rows.insert(1, (f"maj@{summary['samples']}", f"{summary['maj_at_k']['value']:.1%}"))
        left_out = summary["thinking_tokens"]["left_out"]
        if left_out:
            rows.insert(
                4, ("replies without a finished thought", f"{left_out} of {summary['replies']}, left out of lengths")
            )
        return [(label, text) for label, text in rows if text]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label.ljust(width)}  {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>" for label, text in self.rows())
        return f"<table>{''.join(cells)}</table>"

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            SteerError: it is not there, not finished, or damaged.
        """
        folder = Path(folder)
        traces = Traces.load(folder)
        for name in (SUMMARY, ITEMS):
            if not (folder / name).is_file():
                raise SteerError(
                    f"the run {folder} has no {name}", "a finished evaluation", "Finish it: steer evaluate … --resume"
                )
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        return cls(folder, traces, summary, thresholds((folder / ITEMS).read_text("utf-8")))


def items_text(items: Sequence[Item]) -> str:
    """The content of `items.jsonl`, without the questions, which stand in the traces."""
    lines = [canonical({key: value for key, value in asdict(item).items() if key in ITEM_KEYS}) for item in items]
    return "".join(f"{line}\n" for line in sorted(lines))


def thresholds(text: str) -> dict[str, int]:
    """Per question below how many tokens a thought is short, from `items.jsonl`.

    Raises:
        SteerError: an unknown key.
    """
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        known_keys(row, ITEM_KEYS, ITEMS)
    return {row["id"]: row["short_below"] for row in rows if row["short_below"] is not None}


def _interval(found: Summary, percent: bool = False) -> str:
    form = "{:.1%}" if percent else "{:.1f}"
    if found["value"] is None:
        return ""
    text = form.format(found["value"])
    return text if found["low"] is None else f"{text} ({form.format(found['low'])} to {form.format(found['high'])})"
