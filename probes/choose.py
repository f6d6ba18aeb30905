"""Layer and coefficient of a steering: chosen on questions of their own, under a floor of accuracy, judged on others.

Questions are cut into three parts that share none (`parts`): the direction is made from the first, layer and coefficient
are chosen on the second (`choose`), and what they do is told from the third alone (`Choice.judged`), beside the unsteered
model and beside random directions of equal norm. The best of many points looks better on its own questions than it is.

What counts stands in `probes.compared`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.compared import AIMS, DROP, Answers, answers, beyond, first
from steer.errors import SteerError
from steer.figures import BLUE, GREY, ORANGE, canvas
from steer.intervals import RESAMPLES, Interval
from steer.tables import table
from steer.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SHARES = (0.5, 0.25, 0.25)
Point = tuple[tuple[int, ...], float]
"""Layers, increasing, and a coefficient; the unsteered model is ((), 0.0)."""
PLAIN: Point = ((), 0.0)


@dataclass(frozen=True)
class Tried:
    """What a point did.

    Attributes:
        layers: at which the direction was added; none for the unsteered model.
        coefficient: by which it was multiplied.
        accuracy: share of right replies.
        length: mean length of thought in tokens.
        closed: share of the thoughts that end; None without thoughts.
        accuracy_change, length_change: against the unsteered model on the same drawn questions.
    """

    layers: tuple[int, ...]
    coefficient: float
    accuracy: Interval
    length: Interval
    closed: float | None
    accuracy_change: Interval
    length_change: Interval

    @property
    def label(self) -> str:
        """Layers and coefficient in words."""
        return f"layers {', '.join(map(str, self.layers))} at {self.coefficient:+g}" if self.layers else "unsteered"

    def row(self) -> dict[str, float | str | None]:
        """Return everything as one row of a table."""
        found: dict[str, float | str | None] = {"steering": self.label, "coefficient": self.coefficient}
        for name in ("accuracy", "length", "accuracy_change", "length_change"):
            value: Interval = getattr(self, name)
            found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        return found | {"closed": self.closed}


@dataclass(frozen=True)
class Judged:
    """What the chosen point does on questions that nothing was chosen on.

    Attributes:
        rows: the unsteered model, the chosen point, and the controls, by name.
        beyond: change of accuracy and of length, chosen minus the mean of the controls, on the same drawn questions; None
            without controls.
        questions: how many.
    """

    rows: Mapping[str, Tried]
    beyond: Mapping[str, Interval] | None
    questions: int

    def frame(self) -> DataFrame:
        """Return one row per model."""
        rows = self._named()
        return table(rows, list(rows[0]))

    def _repr_html_(self) -> str:
        return _html(self._named())

    def _named(self) -> list[dict[str, object]]:
        return [{"name": name, **each.row()} for name, each in self.rows.items()]

    def plot(self) -> Figure:
        """Draw accuracy against length, one mark per model."""
        return _figure([(name, each, BLUE if name == "chosen" else GREY) for name, each in self.rows.items()], None)


@dataclass(frozen=True)
class Choice:
    """The points that were tried, and the one that was chosen.

    Attributes:
        tried: the unsteered model first.
        chosen: place in `tried`; 0 where no steering was better under the floor.
        floor: of the accuracy.
        aim: a word of `AIMS`.
        questions: on which all this was measured; nothing else may be told of them.
    """

    tried: tuple[Tried, ...]
    chosen: int
    floor: float
    aim: str
    questions: frozenset[str]

    @property
    def best(self) -> Tried:
        """What was chosen."""
        return self.tried[self.chosen]

    def sentence(self) -> str:
        """Say what was chosen and why."""
        allowed = sum((each.accuracy.value or 0.0) >= self.floor for each in self.tried)
        return (
            f"Chosen on {len(self.questions)} questions: {self.best.label} ({AIMS[self.aim]}, among {allowed} of "
            f"{len(self.tried)} points with an accuracy of {self.floor:.3f} or more)."
        )

    def frame(self) -> DataFrame:
        """Return one row per point, with whether it was chosen."""
        rows = [each.row() | {"chosen": place == self.chosen} for place, each in enumerate(self.tried)]
        return table(rows, list(rows[0]))

    def _repr_html_(self) -> str:
        rows = [each.row() | {"chosen": place == self.chosen} for place, each in enumerate(self.tried)]
        return f"<p>{html.escape(self.sentence())}</p>{_html(rows)}"

    def plot(self) -> Figure:
        """Draw accuracy against length, the floor, and the chosen point."""
        marks = [(each.label, each, ORANGE if place == self.chosen else BLUE) for place, each in enumerate(self.tried)]
        return _figure(marks, self.floor)

    def judged(
        self,
        plain: Iterable[Trace],
        chosen: Iterable[Trace],
        controls: Mapping[str, Iterable[Trace]] | None = None,
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Judged:
        """Say what the chosen point does on other questions.

        Args:
            plain: graded replies of the unsteered model.
            chosen: of the chosen point.
            controls: name -> of the model with a random direction of equal norm at the same layers and coefficient.
            resamples, seed: of the intervals.

        Raises:
            SteerError: a question that the choice was made on, different questions, or ungraded replies.
        """
        runs = {"unsteered": list(plain), "chosen": list(chosen)}
        runs |= {name: list(traces) for name, traces in (controls or {}).items()}
        seen = sorted({trace.item for traces in runs.values() for trace in traces} & self.questions)
        if seen:
            raise SteerError(
                f"{len(seen)} questions, such as {seen[0]}, are among those that the point was chosen on",
                "questions that nothing was chosen on",
                "Cut the questions with probes.choose.parts and report on the third part",
            )
        tables = answers(runs)
        options = {"resamples": resamples, "seed": seed}
        rows = {
            name: _tried(PLAIN if name == "unsteered" else (self.best.layers, self.best.coefficient), tables[name], tables["unsteered"], options)
            for name in runs
        }  # fmt: skip
        others = [tables[name] for name in controls or {}]
        names = ("accuracy", "length") if others else ()
        found = {name: beyond(tables["chosen"], others, name, **options) for name in names}
        return Judged(rows, found or None, len(tables["unsteered"].items))


def choose(
    grid: Mapping[Point, Iterable[Trace]],
    *,
    floor: float | None = None,
    drop: float = DROP,
    aim: str = "shorter",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Choice:
    """Choose layers and coefficient.

    Args:
        grid: (layers, coefficient) -> graded replies to the choosing questions; `PLAIN` has to be among them.
        floor: least accuracy; None: that of the unsteered model less `drop`.
        drop: see there.
        aim: "shorter", "longer" or "accuracy". Of equal points the one with the smaller coefficient, then the fewer layers.
        resamples, seed: of the intervals.

    Raises:
        SteerError: the unsteered model is missing or below the floor with everything else, replies that are not graded,
            points that answered different questions, or an unknown aim.
    """
    if aim not in AIMS:
        raise SteerError(f"the aim is {aim!r}", f"one of {', '.join(AIMS)}")
    points = {(tuple(sorted(layers)), float(c)): list(traces) for (layers, c), traces in grid.items()}
    if PLAIN not in points:
        raise SteerError(
            "the grid lacks the unsteered model", "its replies under ((), 0.0)", "Generate without steering, too"
        )
    tables = answers(points)
    options = {"resamples": resamples, "seed": seed}
    order = [PLAIN, *sorted((point for point in points if point != PLAIN), key=lambda point: (point[0], point[1]))]
    tried = tuple(_tried(point, tables[point], tables[PLAIN], options) for point in order)
    chosen, least = first(
        [(each.accuracy.value or 0.0, each.length.value or 0.0) for each in tried],
        [(abs(each.coefficient), len(each.layers)) for each in tried],
        [each.label for each in tried],
        floor=floor,
        drop=drop,
        aim=aim,
    )
    return Choice(tried, chosen, least, aim, frozenset(tables[PLAIN].items))


def parts(
    items: Iterable[str], shares: Sequence[float] = SHARES, seed: int = 0
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Cut questions at random into those to fit, to choose and to report on.

    Args:
        items: ids of questions, in any order and as often as there are replies.
        shares: of the three, summing to one.
        seed: of the cut.

    Raises:
        SteerError: shares that do not sum to one, or too few questions for a part.
    """
    names = sorted(set(items))
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise SteerError(f"the shares are {list(shares)}", "three numbers above zero that sum to one")
    mixed = np.random.default_rng(seed).permutation(np.array(names, dtype=object)).tolist()
    ends = [round(len(names) * shares[0]), round(len(names) * (shares[0] + shares[1]))]
    found = frozenset(mixed[: ends[0]]), frozenset(mixed[ends[0] : ends[1]]), frozenset(mixed[ends[1] :])
    if not all(found):
        raise SteerError(
            f"{len(names)} questions cannot be cut into parts of {', '.join(f'{share:g}' for share in shares)}",
            "at least one question in each",
            "Ask more questions",
        )
    return found


def _tried(point: Point, found: Answers, plain: Answers, options: Mapping[str, int]) -> Tried:
    means, changes = found.means(**options), found.changes(plain, **options)
    return Tried(*point, means["accuracy"], means["length"], means["closed"].value, changes["accuracy"], changes["length"])  # fmt: skip


def _html(rows: Sequence[Mapping[str, object]]) -> str:
    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(marks: Sequence[tuple[str, Tried, str]], floor: float | None) -> Figure:
    figure, (axes,) = canvas(1)
    for label, each, colour in marks:
        x, y = each.length.value or 0.0, each.accuracy.value or 0.0
        spread = [[y - (each.accuracy.low or y)], [(each.accuracy.high or y) - y]]
        axes.errorbar([x], [y], yerr=np.clip(spread, 0, None), fmt="o", color=colour, markersize=4, linewidth=1)
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if floor is not None:
        axes.axhline(floor, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="mean length of thought, tokens", ylabel="accuracy")
    return figure
