"""The tasks by name. Text form: NAME or NAME:ARGUMENT, such as `chain`, `chain:fit`, `gsm8k:test.jsonl`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module

from experiments.tasks.task import Task
from steer.errors import SteerError

Maker = Callable[[str | None, str | None], Task]
"""Makes a task of (argument after the colon, instruction to append to every question); either may be None."""

_KNOWN: dict[str, str | Maker] = {
    "chain": "experiments.tasks.chain",
    "gsm8k": "experiments.tasks.gsm8k",
    "math500": "experiments.tasks.math500",
    "jsonl": "experiments.tasks.jsonl",
}


def names() -> tuple[str, ...]:
    """Names of the tasks."""
    return tuple(_KNOWN)


def register(name: str, maker: Maker) -> None:
    """Make a task of your own known under a name.

    Raises:
        SteerError: the name is taken or holds a colon, or `maker` does not take the two arguments of a `Maker`.
    """
    if name in _KNOWN or ":" in name or not name:
        raise SteerError(f"the task name {name!r} is taken, empty, or holds a colon", "a free name", "Choose another")
    try:
        inspect.signature(maker).bind(None, None)
    except TypeError as error:
        raise SteerError(f"the maker of task {name!r} cannot be called with two arguments ({error})",
                         "maker(argument, instruction)") from error  # fmt: skip
    _KNOWN[name] = maker


def named(text: str, instruction: str | None = None) -> Task:
    """Make a task from its text form.

    Args:
        text: NAME or NAME:ARGUMENT.
        instruction: appended to every question on a line of its own; None takes the task's default, "" appends nothing.

    Raises:
        SteerError: there is no such task, or the task refuses its argument.
    """
    name, _, argument = text.partition(":")
    if name not in _KNOWN:
        raise SteerError(
            f"there is no task {name!r}",
            f"one of {', '.join(_KNOWN)}",
            "Questions of your own: --task jsonl:FILE, one object with question and answer per line",
        )
    maker = _KNOWN[name]
    if isinstance(maker, str):
        maker = import_module(maker).make
    assert callable(maker)
    made: Task = maker(argument or None, instruction)
    return made
