"""What a task is: items to ask, and a grader that reads the reply to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from steer.prompts import Content


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: names it; sorting by it gives the order of a run.
        question: what the user says.
        gold: the right answer, in the form that the grader compares with.
        group: items of equal size or difficulty share it.
        short_below: a thought of fewer thinking tokens (marks counted) is short; None where nothing says so. It
            belongs to the question and is never taken from replies.
        messages: the chat to send instead of the question alone.
    """

    id: str
    question: str
    gold: str
    group: str | None = None
    short_below: int | None = None
    messages: tuple[dict[str, Any], ...] | None = None

    def content(self, chat: bool) -> Content:
        """What the model is asked: chat messages where the tokenizer has a template, else the question as raw text."""
        if self.messages is not None:
            return [dict(message) for message in self.messages]
        return [{"role": "user", "content": self.question}] if chat else self.question


@dataclass(frozen=True)
class Graded:
    """What a grader found in a reply.

    Attributes:
        answer: the final answer as it stands in the reply; None if there is none.
        correct: whether it is the right one.
        span: characters [start, end) of the reply where it stands; None if it has no place.
    """

    answer: str | None = None
    correct: bool = False
    span: tuple[int, int] | None = None


class Task(Protocol):
    """Where questions come from. `name` is its text form without paths, such as "gsm8k"."""

    @property
    def name(self) -> str:
        """Name, as in run.yaml."""
        ...

    def options(self) -> dict[str, Any]:
        """Everything else that its items and grades depend on, as plain data, for run.yaml."""
        ...

    def items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` items, or all of them.

        Raises:
            SteerError: there are none, or their file cannot be read.
        """
        ...

    def grade(self, text: str, gold: str, start: int | None) -> Graded:
        """Read a reply.

        Args:
            text: the reply, without its end token.
            gold: of the item.
            start: index of the first character after the thought; 0 where there is none; None where the thought never
                closed, so that there is no final answer.
        """
        ...
