"""Tasks: where questions come from, and how replies to them are graded.

`named("gsm8k:test.jsonl")` makes a task from its text form; a new task is a function registered once in
`experiments.tasks.registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from experiments.tasks.registry import named as named
    from experiments.tasks.registry import names as names
    from experiments.tasks.registry import register as register
    from experiments.tasks.task import Graded as Graded
    from experiments.tasks.task import Item as Item
    from experiments.tasks.task import Task as Task

export(
    __name__,
    {
        "Graded": "experiments.tasks.task",
        "Item": "experiments.tasks.task",
        "Task": "experiments.tasks.task",
        "named": "experiments.tasks.registry",
        "names": "experiments.tasks.registry",
        "register": "experiments.tasks.registry",
    },
)
