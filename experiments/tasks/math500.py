"""MATH-500: five hundred competition problems of the MATH test set (arXiv 2103.03874), answers in LaTeX.

One object a line with `problem` and `answer`; where it has a `level` that is the group.
"""

from __future__ import annotations

from experiments.tasks.gsm8k import INSTRUCTION
from experiments.tasks.jsonl import FileTask, Row, found_file, text_of
from experiments.tasks.task import Item


def item_of(number: int, row: Row) -> Item:
    """Make an item of a row; its id is the line's number, its group the level from 1 to 5."""
    level = row.get("level")
    return Item(
        f"math500-{number:05d}",
        text_of(row, "problem"),
        text_of(row, "answer"),
        None if level is None else str(level).removeprefix("Level "),
    )


def make(argument: str | None, instruction: str | None) -> FileTask:
    """Make the task of `math500[:FILE]`."""
    file = found_file("math500", argument, "math500_test.jsonl", "a copy of MATH-500 in JSON Lines")
    return FileTask("math500", file, INSTRUCTION if instruction is None else instruction, item_of)
