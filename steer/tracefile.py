"""Reading one line of `traces.jsonl`, and all of them: what is unknown is refused, what was cut off is reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.identity import known_keys
from steer.trace import FINISH_REASONS, NAMES, REQUIRED, Trace

ZST = ".jsonl.zst"
_TUPLES = ("prompt_token_ids", "completion_token_ids", "thinking_span", "answer_span", "forced")
logger = logging.getLogger(__name__)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(_whole(part) for part in value)


def _messages(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) for part in value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _span(value: Any) -> bool:
    return value is None or (_wholes(value) and len(value) == 2)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_text, "text"),
    "item": (_text, "text"),
    "sample": (_whole, "a whole number"),
    "prompt": (_messages, "text or a list of messages"),
    "prompt_token_ids": (_wholes, "a list of whole numbers"),
    "completion_token_ids": (_wholes, "a list of whole numbers"),
    "text": (_text, "text"),
    "thinking_span": (_span, "[start, end] or null"),
    "closed": (_optional(_flag), "true, false or null"),
    "thinking_tokens": (_optional(_whole), "a whole number or null"),
    "answer_span": (_span, "[start, end] or null"),
    "answer_tokens": (_optional(_whole), "a whole number or null"),
    "forced": (_wholes, "a list of whole numbers"),
    "answer": (_optional(_text), "text or null"),
    "gold": (_optional(_text), "text or null"),
    "correct": (_optional(_flag), "true, false or null"),
    "finish_reason": (
        lambda value: value is None or value in FINISH_REASONS,
        f"null or one of {', '.join(FINISH_REASONS)}",
    ),
    "group": (_optional(_text), "text or null"),
    "generation_prompt_start": (_whole, "a whole number"),
}


def parse_line(line: str) -> Trace:
    """Read what `trace_line` wrote; keys beyond the required ones may be missing.

    Raises:
        SteerError: not JSON, an unknown or missing key, a value of the wrong kind, or spans outside the tokens.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise SteerError(f"a trace line is not JSON ({error})", "one object per line") from error
    if not isinstance(data, Mapping):
        raise SteerError(f"a trace line holds a {type(data).__name__}", "one object per line")
    known_keys(data, NAMES, "a trace line")
    missing = [name for name in REQUIRED if name not in data]
    if missing:
        raise SteerError(f"a trace line lacks {', '.join(missing)}", f"at least {', '.join(REQUIRED)}")
    for name, value in data.items():
        fits, what = _CHECKS[name]
        if not fits(value):
            raise SteerError(f"a trace line has {str(value)[:60]!r} as {name}", what)
    values: dict[str, Any] = {
        name: tuple(value) if name in _TUPLES and value is not None else value for name, value in data.items()
    }
    return Trace(**values)


def read_traces(path: Path) -> tuple[list[Trace], int]:
    """All traces of a file, and how many cut last lines were dropped (0 or 1).

    Raises:
        SteerError: a malformed line that is not the cut end of the file, or one id twice; the message has the line's number.
    """
    lines = _read(path).split(b"\n")  # Not splitlines: a text may hold other line separators.
    last = max((index for index, line in enumerate(lines) if line.strip()), default=-1)
    traces: list[Trace] = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(lines[: last + 1]):
        if index == last and _cut(raw):
            logger.warning(
                "%s: line %d was cut off and is skipped; the %d before it are kept.", path, index + 1, len(traces)
            )
            return traces, 1
        if not raw.strip():
            raise SteerError(f"line {index + 1} of {path} is empty", "one trace per line")
        try:
            trace = parse_line(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SteerError(f"line {index + 1} of {path} is not UTF-8 text", "one trace per line, as JSON") from error
        except SteerError as error:
            raise SteerError(
                f"line {index + 1} of {path}: {error.found}", error.expected, "Remove or repair the line"
            ) from error
        if trace.id in seen:
            raise SteerError(
                f"lines {seen[trace.id]} and {index + 1} of {path} both have the id {trace.id!r}", "ids that differ"
            )
        seen[trace.id] = index + 1
        traces.append(trace)
    return traces, 0


def _cut(raw: bytes) -> bool:
    """Whether this is the beginning of a line and no whole one."""
    try:
        json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return raw.lstrip().startswith(b"{")
    return False


def _read(path: Path) -> bytes:
    if not path.name.endswith(ZST):
        return path.read_bytes()
    with (
        path.open("rb") as source,
        zstandard().ZstdDecompressor().stream_reader(source, read_across_frames=True) as stream,
    ):
        return bytes(stream.read())


def zstandard() -> Any:
    """The module behind `.jsonl.zst`.

    Raises:
        SteerError: it is not installed.
    """
    try:
        return import_module("zstandard")
    except ImportError as error:
        raise SteerError(
            "traces are in .jsonl.zst, but the package zstandard is not installed",
            "",
            "pip install zstandard, or unpack the file with zstd -d",
        ) from error
