"""What a verb says: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol


class Bar(Protocol):
    """A progress bar that moves."""

    def to(self, done: float, total: float | None = None, note: str = "") -> None:
        """Set how much is done, and of how much; `note` stands behind it, for instance tokens per second."""

    def add(self, more: float) -> None:
        """Say that `more` is done."""


@dataclass(frozen=True)
class Output:
    """The two streams of a verb.

    Attributes:
        json: stdout carries exactly one JSON object, from `result`.
        quiet: stderr carries errors only.
    """

    json: bool = False
    quiet: bool = False

    def remark(self, text: str) -> None:
        """Say something on stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Print a line of the result for people; nothing with --json."""
        if not self.json:
            print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table of the result for people; nothing with --json. Numbers are aligned to the right."""
        if self.json:
            return
        cells = [[_cell(value) for value in row] for row in rows]
        numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(columns))]
        widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]

        def line(values: Sequence[str]) -> str:
            parts = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)]
            return "  " + "  ".join(parts).rstrip()

        self.text("\n".join([*([title] if title else []), line(list(columns)), *map(line, cells)]))

    def result(self, result: Mapping[str, Any]) -> None:
        """Print `result` as the one JSON object of --json; nothing without it."""
        if self.json:
            print(dumps(result), flush=True)

    @contextmanager
    def progress(self, label: str, total: float | None = None) -> Iterator[Bar]:
        """Show a bar on stderr while the block runs, if stderr is a terminal and not quiet."""
        if self.quiet or not sys.stderr.isatty():
            yield _Still()
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=total, note="")

            class Moving:
                def to(self, done: float, total: float | None = None, note: str = "") -> None:
                    bars.update(task, completed=done, total=total, note=note)

                def add(self, more: float) -> None:
                    bars.advance(task, more)

            yield Moving()


class _Still:
    """A bar that nobody sees."""

    def to(self, done: float, total: float | None = None, note: str = "") -> None: ...

    def add(self, more: float) -> None: ...


def dumps(result: Mapping[str, Any]) -> str:
    """Write `result` as JSON: paths as text, frozen values as objects, numbers that are not finite as null."""
    return json.dumps(_plain(result), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
