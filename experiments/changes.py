"""What a change of a model did to its replies: differences with intervals, the same questions drawn before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.run import Run
from steer.intervals import Interval, Statistic, paired


@dataclass(frozen=True)
class Change:
    """What changed, with paired intervals over questions."""

    accuracy: Interval
    short_share: Interval
    mean_thinking_tokens: Interval
    accuracy_of_shortest_fifth: Interval
    closed_share: Interval

    @classmethod
    def between(cls, before: Run, after: Run, seed: int = 0) -> Change:
        """Compare two runs on the same questions; `seed` is of the bootstrap."""
        first, second = before.replies, after.replies
        questions = len(first.rows)

        def difference(figure: str) -> Interval:
            one, other = (replies.statistic(getattr(replies, figure)) for replies in (first, second))
            return paired(one, other, questions, seed=seed)

        shortest = paired(first.shortest(0, 0.2), second.shortest(0, 0.2), questions, seed=seed)
        return cls(difference("correct"), difference("short"), difference("length"), shortest, difference("closed"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: interval.to_dict() for name, interval in vars(self).items()}


def beyond(run: Run, controls: Sequence[Run], seed: int = 0, figure: str = "correct") -> Interval:
    """How far a figure of a run lies above the mean of its controls, all on the same questions.

    Args:
        run: of the change.
        controls: at least one.
        seed: of the bootstrap.
        figure: a method of `experiments.summary.Replies` that takes a reply.
    """
    own, *others = (_statistic(each, figure) for each in (run, *controls))
    questions = len(run.replies.rows)
    return paired(lambda drawn: np.mean([other(drawn) for other in others], axis=0), own, questions, seed=seed)


def _statistic(run: Run, figure: str) -> Statistic:
    replies = run.replies
    return replies.statistic(getattr(replies, figure))


def short_share(run: Run) -> float | None:
    """Share of the finished thoughts that are short."""
    value = run.summary["thoughts"]["short"]["value"]
    return None if value is None else float(value)


def closed_share(run: Run) -> float | None:
    """Share of the thoughts that end."""
    value = run.summary["thoughts"]["closed"]["value"]
    return None if value is None else float(value)


def figures(run: Run) -> dict[str, Any]:
    """The four figures of a run, each with its interval."""
    return {
        "accuracy": run.summary["accuracy"],
        "mean_thinking_tokens": run.summary["thinking_tokens"]["mean"],
        "short_share": run.summary["thoughts"]["short"],
        "closed_share": run.summary["thoughts"]["closed"],
    }


def standing(run: Run) -> dict[str, Any]:
    """How a run does, as the demos' `baseline` tells it."""
    return {
        "accuracy": run.accuracy,
        "mean_thinking_tokens": run.mean_thinking_tokens,
        "short_share": short_share(run),
        "closed_share": closed_share(run),
        "replies": run.summary["replies"],
        "intervals": figures(run),
    }
