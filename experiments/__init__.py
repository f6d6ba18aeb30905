"""Compare models: tasks, evaluation, think policies, organisms, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from experiments.evaluate import evaluate as evaluate
    from experiments.run import Run as Run

export(
    __name__,
    {
        "Run": "experiments.run",
        "evaluate": "experiments.evaluate",
    },
)
