"""Replies of several models to the same questions as numbers, compared question by question; and which model comes first.

The rule of `first` is ours: of the models whose accuracy on these questions is at least the floor, the one that comes
first by the aim. The floor is by default the accuracy of the first one, unsteered, less `drop`; the accuracy itself counts,
not its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from steer.errors import SteerError
from steer.intervals import Interval, Statistic, bootstrap, mean_of, paired
from steer.trace import Trace

AIMS = {"shorter": "thinking tokens, fewest", "longer": "thinking tokens, most", "accuracy": "accuracy, highest"}
DROP = 0.02
ROUNDING = 1e-9
"""What a mean of zeros and ones may be off by, so that a point exactly at the floor is not below it."""
Key = TypeVar("Key")
Columns = Callable[[Sequence[Trace]], Mapping[str, Sequence[float | None]]]
"""From replies to numbers, one per reply; None where it has none."""


def plain_columns(traces: Sequence[Trace]) -> dict[str, list[float | None]]:
    """Return accuracy (0 or 1), length of thought in tokens, and whether the thought ends (None without a thought)."""
    return {
        "accuracy": [float(bool(trace.correct)) for trace in traces],
        "length": [float(trace.thought_length) for trace in traces],
        "closed": [None if trace.closed is None else float(trace.closed) for trace in traces],
    }


@dataclass(frozen=True)
class Answers:
    """Replies of one model, in order of question and sample.

    Attributes:
        items: the questions.
        asked: (question, sample) of every reply.
        columns: name -> a number per reply, in rows of questions.
    """

    items: tuple[str, ...]
    asked: tuple[tuple[str, int], ...]
    columns: Mapping[str, list[list[float | None]]]

    def statistic(self, name: str) -> Statistic:
        """The mean over the replies of drawn questions."""
        return mean_of(self.columns[name])

    def means(self, **options: int) -> dict[str, Interval]:
        """The mean of every column with its interval over questions; options of `steer.intervals.bootstrap`."""
        return {name: bootstrap(self.statistic(name), len(self.items), **options) for name in self.columns}

    def changes(self, plain: Answers, **options: int) -> dict[str, Interval]:
        """Every mean less that of `plain`, on the same drawn questions."""
        return {name: beyond(self, [plain], name, **options) for name in self.columns}


def answers(runs: Mapping[Key, Sequence[Trace]], columns: Columns = plain_columns) -> dict[Key, Answers]:
    """Return the replies of several models to the same questions.

    Raises:
        SteerError: replies that are not graded, or models that answered different questions.
    """
    found = {key: _answers(traces, columns) for key, traces in runs.items()}
    if len({each.asked for each in found.values()}) > 1:
        raise SteerError(
            f"the {len(found)} models answered different questions, or a different number of times",
            "the same items and samples from each",
            "Generate all of them from the same prompts with the same number of samples",
        )
    return found


def _answers(traces: Sequence[Trace], columns: Columns) -> Answers:
    ungraded = sum(trace.correct is None for trace in traces)
    if not traces or ungraded:
        raise SteerError(
            f"{ungraded} of {len(traces)} replies are not graded",
            "graded replies, at least one",
            "Grade them, as `steer evaluate` does",
        )
    ordered = sorted(traces, key=lambda trace: (trace.item, trace.sample))
    rows: dict[str, list[int]] = {}
    for place, trace in enumerate(ordered):
        rows.setdefault(trace.item, []).append(place)
    return Answers(
        tuple(rows),
        tuple((trace.item, trace.sample) for trace in ordered),
        {
            name: [[values[place] for place in row] for row in rows.values()]
            for name, values in columns(ordered).items()
        },
    )


def beyond(one: Answers, others: Sequence[Answers], name: str, **options: int) -> Interval:
    """Return the mean of a column less the mean of it over other models, on the same drawn questions."""
    each = [other.statistic(name) for other in others]

    def average(drawn: np.ndarray) -> np.ndarray:
        return np.asarray(np.mean([statistic(drawn) for statistic in each], axis=0))

    return paired(average, one.statistic(name), len(one.items), **options)


def first(
    means: Sequence[tuple[float, float]],
    costs: Sequence[tuple[float, ...]],
    labels: Sequence[str],
    *,
    floor: float | None,
    drop: float,
    aim: str,
) -> tuple[int, float]:
    """Return the place of what comes first by the aim among what reaches the floor, and the floor.

    Args:
        means: accuracy and length of each; the unsteered model first.
        costs: of equal ones that with the smallest cost comes first, then the earlier.
        labels: for the error.
        floor: least accuracy; None: that of the unsteered model less `drop`.
        drop: see there.
        aim: a word of `AIMS`.

    Raises:
        SteerError: an unknown aim, or none reaches the floor.
    """
    if aim not in AIMS:
        raise SteerError(f"the aim is {aim!r}", f"one of {', '.join(AIMS)}")
    accuracies = [accuracy for accuracy, _ in means]
    least = max(accuracies[0] - drop, 0.0) if floor is None else floor
    allowed = [place for place, accuracy in enumerate(accuracies) if accuracy >= least - ROUNDING]
    if not allowed:
        raise SteerError(
            f"no point reaches an accuracy of {least:.3f}; the best is {labels[int(np.argmax(accuracies))]} with {max(accuracies):.3f}",
            "one that does",
            "Set a lower floor, or try smaller coefficients",
        )
    ranks = {"accuracy": [-accuracy for accuracy, _ in means], "shorter": [length for _, length in means]}
    ranks["longer"] = [-length for length in ranks["shorter"]]
    return min(allowed, key=lambda place: (ranks[aim][place], costs[place])), least
