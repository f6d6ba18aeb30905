"""Tasks from JSON Lines files, graded by math-verify; `jsonl:FILE` takes questions of your own.

One object a line: `question` and `answer`, if wanted `id` (default: the line's number), `group`, `short_below`, and
`messages` (a chat to send instead of the question). What a line holds beyond that is said once and not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.grading import grade_math
from experiments.tasks.task import Graded, Item
from steer.errors import SteerError

logger = logging.getLogger(__name__)
FOLDER = "STEER_DATA"
KEYS = ("id", "question", "answer", "group", "short_below", "messages")
Row = Mapping[str, Any]
Read = Callable[[int, Row], Item]


@dataclass(frozen=True)
class FileTask:
    """Items from the lines of a file.

    Attributes:
        name: as in run.yaml.
        file: JSON Lines, UTF-8.
        instruction: appended to every question on a line of its own.
        read: makes an item of (line number from 1, row).
    """

    name: str
    file: Path
    instruction: str = ""
    read: Read = field(default=lambda number, row: item_of(number, row), repr=False)

    @cached_property
    def content(self) -> bytes:
        """The bytes of the file.

        Raises:
            SteerError: it is not there.
        """
        if not self.file.is_file():
            raise SteerError(
                f"there is no file {self.file}", f"JSON Lines for the task {self.name}", f"--task {self.name}:FILE"
            )
        return self.file.read_bytes()

    def options(self) -> dict[str, Any]:
        """The file's name and hash (its folder does not matter), and the instruction."""
        digest = hashlib.sha256(self.content).hexdigest()
        return {"file": self.file.name, "sha256": digest, "instruction": self.instruction}

    def items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` lines, in the order of the file.

        Raises:
            SteerError: the file is missing or empty, or a line is not what it should be; the message has its number.
        """
        lines = [line for line in self.content.split(b"\n") if line.strip()]
        if not lines:
            raise SteerError(f"{self.file} is empty", "one JSON object per line")
        rows = [_row(line, number, self.file) for number, line in enumerate(lines[:limit], 1)]
        return [self._item(number, row) for number, row in enumerate(rows, 1)]

    def _item(self, number: int, row: Row) -> Item:
        try:
            item = self.read(number, row)
        except SteerError as error:
            raise SteerError(f"line {number} of {self.file}: {error.found}", error.expected, error.remedy) from error
        if self.instruction and item.messages is None:
            return replace(item, question=f"{item.question}\n{self.instruction}")
        return item

    def grade(self, text: str, gold: str, start: int | None) -> Graded:
        """The last boxed expression after the thought, else the last number; equal as mathematics."""
        return Graded() if start is None else grade_math(text, gold, start)


def item_of(number: int, row: Row) -> Item:
    """Make an item of a row with `question` and `answer`.

    Raises:
        SteerError: a key is missing, or a value is of the wrong type.
    """
    question, gold = text_of(row, "question"), text_of(row, "answer")
    group, short, messages = row.get("group"), row.get("short_below"), row.get("messages")
    if short is not None and (isinstance(short, bool) or not isinstance(short, int)):
        raise SteerError(f"short_below is {short!r}", "a whole number of tokens")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(part, dict) for part in messages)):
        raise SteerError("messages is no list of objects", "[{'role': 'user', 'content': …}]")
    return Item(
        str(row.get("id", f"{number:06d}")),
        question,
        gold,
        None if group is None else str(group),
        short,
        None if messages is None else tuple(messages),
    )


def text_of(row: Row, key: str) -> str:
    """The text or number under a key, as text.

    Raises:
        SteerError: it is missing, or something else.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise SteerError(f"{key} is {'missing' if key not in row else repr(value)[:60]}", "text or a number", "")
    return str(value)


def _row(line: bytes, number: int, file: Path) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SteerError(f"line {number} of {file} is not JSON ({error})", "one object per line") from error
    if not isinstance(row, dict):
        raise SteerError(f"line {number} of {file} holds a {type(row).__name__}", "an object")
    return row


def found_file(name: str, argument: str | None, usual: str, source: str) -> Path:
    """The file of a task: the one given, else `usual` in the folder that STEER_DATA names.

    Raises:
        SteerError: neither is there; the message says where the data come from.
    """
    if argument is not None:
        return Path(argument).expanduser()
    folder = os.environ.get(FOLDER)
    if folder and (Path(folder) / usual).is_file():
        return Path(folder) / usual
    where = f"the folder {folder} of {FOLDER} has no {usual}" if folder else f"{FOLDER} is not set"
    raise SteerError(
        f"the task {name} was given no file, and {where}",
        f"a JSON Lines file: --task {name}:FILE",
        f"Download it once from {source}; this program does not fetch data sets",
    )


def make(argument: str | None, instruction: str | None) -> FileTask:
    """Make the task of `jsonl:FILE`.

    Raises:
        SteerError: no file was named.
    """
    if argument is None:
        raise SteerError("the task jsonl was given no file", "--task jsonl:FILE", "Name a file of question and answer")
    task = FileTask("jsonl", Path(argument).expanduser(), instruction or "")
    lines = [line for line in task.content.split(b"\n") if line.strip()]
    unused = sorted({key for number, line in enumerate(lines, 1) for key in _row(line, number, task.file)} - set(KEYS))
    if unused:
        logger.warning("%s: the keys %s are not used.", task.file, ", ".join(unused))
    return task
