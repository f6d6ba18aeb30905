"""GSM8K (arXiv 2110.14168): grade-school word problems whose answer is a number after `####`.

The file of the authors, openai/grade-school-math (MIT): one object with `question` and `answer` per line. The paper
behind ThinkEdit asks without any instruction (`--instruction ""`).
"""

from __future__ import annotations

import re

from experiments.tasks.jsonl import FileTask, Row, found_file, text_of
from experiments.tasks.task import Item
from steer.errors import SteerError

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_GOLD = re.compile(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)\s*$")


def gold_of(answer: str) -> str:
    """The number after `####`, without thousands commas: `1,080` is 1080.

    Raises:
        SteerError: there is none.
    """
    found = _GOLD.search(answer)
    if found is None:
        raise SteerError(f"the answer ends in {answer[-40:]!r}", "#### and a number")
    return found[1].replace(",", "")


def item_of(number: int, row: Row) -> Item:
    """Make an item of a row; its id is the line's number, so that runs on the same file can be paired."""
    return Item(f"gsm8k-{number:05d}", text_of(row, "question"), gold_of(text_of(row, "answer")))


def make(argument: str | None, instruction: str | None) -> FileTask:
    """Make the task of `gsm8k[:FILE]`."""
    source = "openai/grade-school-math on GitHub (grade_school_math/data/test.jsonl)"
    file = found_file("gsm8k", argument, "gsm8k_test.jsonl", source)
    return FileTask("gsm8k", file, INSTRUCTION if instruction is None else instruction, item_of)
