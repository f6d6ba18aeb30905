"""Traces: the replies of a run, as a sequence with what is known of all of them (`run.yaml`).

Everything about one reply is in `steer.trace`, the reading of files in `steer.tracefile`; both can be had from here.
"""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import yaml

from steer.errors import SteerError
from steer.figures import lengths_figure
from steer.files import replacing, write_text
from steer.identity import check_tokenizer, known_keys, tokenizer_id
from steer.marks import Marks
from steer.prompts import render
from steer.spans import check_span, span_positions
from steer.tables import table
from steer.trace import FinishReason, Span, Trace, make_trace, token_span, trace_line
from steer.tracefile import ZST, parse_line, read_traces, zstandard

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = [
    "FinishReason",
    "Span",
    "Trace",
    "Traces",
    "from_text",
    "make_trace",
    "parse_line",
    "token_span",
    "trace_line",
]

RUN, LINES = "run.yaml", "traces.jsonl"
ROW_KEYS = ("prompt", "text", "item", "sample", "gold", "group", "answer", "correct", "finish_reason")


class Traces(Sequence[Trace]):
    """An immutable sequence of traces.

    Args:
        traces: in the order to keep.
        meta: the content of `run.yaml`: `model`, `tokenizer_id`, `marks`, `sampling` and so on.
        dropped: cut last lines that were skipped on reading (0 or 1).
        tokenizer: only needed for `marker:` spans.
    """

    def __init__(
        self, traces: Iterable[Trace], meta: Mapping[str, Any] | None = None, *, dropped: int = 0, tokenizer: Any = None
    ) -> None:
        self._traces = tuple(traces)
        self.meta: dict[str, Any] = dict(meta or {})
        self.dropped = dropped
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._traces)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> Traces: ...
    def __getitem__(self, index: int | slice) -> Trace | Traces:
        return self._with(self._traces[index]) if isinstance(index, slice) else self._traces[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traces) and self._traces == other._traces and self.meta == other.meta

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        thoughts = [trace for trace in self if trace.thinking_span is not None]
        closed = sum(bool(trace.closed) for trace in thoughts)
        return f"<{len(self)} traces of {len({trace.item for trace in self})} items, {len(thoughts)} with a thought, {closed} closed>"

    def _repr_html_(self) -> str:
        names = ("id", "thinking_tokens", "closed", "correct", "text")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(getattr(trace, name))[:300])}</td>" for name in names) + "</tr>"
            for trace in self[:5]
        )
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"

    def _with(self, traces: Iterable[Trace]) -> Traces:
        return Traces(traces, self.meta, tokenizer=self.tokenizer)

    @property
    def marks(self) -> Marks:
        """The marks that the traces were made with; none if the run does not say."""
        return Marks.from_dict(self.meta.get("marks") or {})

    def where(self, keep: Callable[[Trace], bool]) -> Traces:
        """The traces for which `keep` is true, with the same meta."""
        return self._with(trace for trace in self if keep(trace))

    def span(self, name: str, tokenizer: Any = None) -> list[list[int]]:
        """Positions of a span in every trace (see `steer.spans`); empty where a trace does not have it.

        Raises:
            SteerError: an unknown span, one that needs marks or a tokenizer that are missing, or an impossible marker.
        """
        check_span(name)
        return [span_positions(name, trace, self.marks, tokenizer or self.tokenizer) for trace in self]

    def frame(self) -> pandas.DataFrame:
        """One row per trace: every field, and `thought_length`.

        Raises:
            SteerError: pandas is not installed.
        """
        rows = [{**asdict(trace), "thought_length": trace.thought_length} for trace in self]
        return table(rows, [*Trace.__dataclass_fields__, "thought_length"])

    def plot(self) -> Figure:
        """Draw a histogram of `thought_length`; the title counts the traces and the thoughts that never close.

        A trace without a thought counts with the length of its reply up to the answer, and has a colour of its own.

        Raises:
            SteerError: there is no trace.
        """
        parts: dict[str, list[int]] = {"closed": [], "not closed": [], "without a thought": []}
        for trace in self.require_some():
            kind = "without a thought" if trace.closed is None else "closed" if trace.closed else "not closed"
            parts[kind].append(trace.thought_length)
        counts = [f"{kind}: {len(parts[kind])}" for kind in ("not closed", "without a thought")]
        return lengths_figure(parts, ", ".join([f"traces: {len(self)}", *counts]))

    def require_some(self, what: str = "the run") -> Traces:
        """These traces, unless there are none.

        Raises:
            SteerError: there is no trace.
        """
        if not self._traces:
            cut = " (one line was cut off and skipped)" if self.dropped else ""
            raise SteerError(
                f"{what} has no traces{cut}",
                "at least one",
                "Generate or evaluate first, and check the path and any filter",
            )
        return self

    def require_tokenizer(self, expected: str, what: str = "the run") -> Traces:
        """These traces, unless another tokenizer made them; `expected` is the model's `identity.tokenizer_id`.

        Raises:
            SteerError: both ids are known and differ.
        """
        check_tokenizer(str(self.meta.get("tokenizer_id", "unknown")), expected, what)
        return self

    def lines(self) -> bytes:
        """The bytes of `traces.jsonl`."""
        return "".join(f"{trace_line(trace)}\n" for trace in self).encode("utf-8")

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write a run folder (`run.yaml`, `traces.jsonl`), or one `.jsonl` or `.jsonl.zst` file without the meta.

        Nothing half-written is left behind: the folder appears whole, by a rename.

        Raises:
            SteerError: the path exists (a file may be replaced with `overwrite`), or zstandard is missing.
            OSError: the disk or the permissions refuse.
        """
        path = Path(path)
        if path.name.endswith((".jsonl", ZST)):
            data = zstandard().ZstdCompressor().compress(self.lines()) if path.name.endswith(ZST) else self.lines()
            with replacing(path, overwrite) as partial:
                partial.write_bytes(data)
            return path
        refuse_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.mkdir()
        try:
            write_text(partial / RUN, run_text(self.meta))
            with replacing(partial / LINES) as file:
                file.write_bytes(self.lines())
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return path

    @classmethod
    def load(cls, path: str | Path, tokenizer: Any = None) -> Traces:
        """Read a run folder, or a `.jsonl` or `.jsonl.zst` file (with the `run.yaml` beside it, if there is one).

        A cut last line is reported with `logging.warning`, counted in `.dropped` and skipped.

        Raises:
            SteerError: nothing is there, a folder without traces, or a malformed line.
        """
        path = Path(path)
        file = _lines_of(path)
        run = file.parent / RUN
        meta = yaml.safe_load(run.read_text("utf-8")) if run.is_file() else {}
        if not isinstance(meta, dict):
            raise SteerError(
                f"the file {run} holds a {type(meta).__name__}", "a mapping", "This is not the run.yaml of a run folder"
            )
        traces, dropped = read_traces(file)
        return cls(traces, meta, dropped=dropped, tokenizer=tokenizer)


def _lines_of(path: Path) -> Path:
    if not path.exists():
        raise SteerError(
            f"there is no {path}",
            "a run folder or a .jsonl file of traces",
            "Check the path; `steer evaluate` and `steer generate` make runs",
        )
    if not path.is_dir():
        return path
    for name in (LINES, f"{LINES}.zst"):
        if (path / name).is_file():
            return path / name
    raise SteerError(
        f"the folder {path} has no {LINES}",
        "a run folder",
        "A run that was interrupted has its traces only after --resume",
    )


def refuse_folder(path: Path) -> None:
    """Refuse to write into what is there.

    Raises:
        SteerError: `path` exists.
    """
    if path.exists():
        raise SteerError(
            f"the output {path} exists already", "a folder that does not exist yet", "Choose another name or remove it"
        )


def run_text(meta: Mapping[str, Any]) -> str:
    """The text of `run.yaml`: keys sorted, one form for equal values."""
    return str(yaml.safe_dump(dict(meta), sort_keys=True, allow_unicode=True))


def from_text(rows: Iterable[Mapping[str, Any]], tokenizer: Any, marks: Marks | None = None) -> Traces:
    """Traces from plain text, as other programs log it.

    Args:
        rows: mappings with `prompt` (raw text or chat messages) and `text` (the reply, without its end token), and if
            known `item`, `sample`, `gold`, `group`, `answer`, `correct`, `finish_reason`. Without `item` a row is an
            item of its own, without `sample` replies of an item are counted from 0.
        tokenizer: of the model that is to read the traces; prompt and reply are encoded apart and joined.
        marks: default: the tokenizer's.

    Raises:
        SteerError: an unknown or missing key, or a prompt that the chat template refuses.
    """
    marks = Marks.from_tokenizer(tokenizer) if marks is None else marks
    seen: dict[str, int] = {}
    traces: list[Trace] = []
    for number, row in enumerate(rows):
        known_keys(row, ROW_KEYS, f"row {number}")
        if "prompt" not in row or "text" not in row:
            raise SteerError(f"row {number} has {', '.join(map(str, row)) or 'nothing'}", "at least prompt and text")
        prompt = render(tokenizer, row["prompt"], None, marks)
        item = str(row.get("item", f"{number:05d}"))
        sample = int(row.get("sample", seen.get(item, 0)))
        seen[item] = sample + 1
        trace = make_trace(
            item=item,
            sample=sample,
            prompt=row["prompt"],
            prompt_token_ids=prompt.token_ids,
            completion_token_ids=tokenizer(row["text"], add_special_tokens=False)["input_ids"],
            tokenizer=tokenizer,
            marks=marks,
            generation_prompt_start=prompt.generation_prompt_start,
            gold=row.get("gold"),
            group=row.get("group"),
        )
        told: dict[str, Any] = {name: row.get(name) for name in ("answer", "correct", "finish_reason")}
        traces.append(replace(trace, text=str(row["text"]), **told))
    meta = {"source": "text", "tokenizer_id": tokenizer_id(tokenizer), "marks": marks.to_dict()}
    return Traces(traces, meta, tokenizer=tokenizer)
