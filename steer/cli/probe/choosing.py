"""`--choose`: layer and coefficient on questions of their own, and what they do on yet others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.output import Output
from steer.cli.probe.adding import adding
from steer.errors import SteerError

if TYPE_CHECKING:
    from probes.choose import Choice, Judged, Point
    from probes.collect.summary import Summary
    from steer.cli.probe.finding import Asked
    from steer.directions import Direction
    from steer.model import SteerableModel
    from steer.trace import Trace
    from steer.traces import Traces

Choose = Annotated[
    bool,
    typer.Option("--choose", help="Choose layer and coefficient on a part of the run's questions; report on another."),
]
Aim = Annotated[str, typer.Option("--aim", help="Of --choose: shorter, longer or accuracy.")]
Coefficients = Annotated[str, typer.Option("--coefficients", help="Of --choose, between commas.")]
Candidates = Annotated[
    int, typer.Option("--candidates", min=1, help="Of --choose: layers tried, each alone, best held-out areas first.")
]
Floor = Annotated[
    float | None,
    typer.Option("--floor", min=0.0, max=1.0, show_default="unsteered less 0.02", help="Of --choose: least accuracy."),
]
Task = Annotated[
    str | None,
    typer.Option("--task", show_default="the run's", help="Of --choose: whose grader reads the replies."),
]
Controls = Annotated[int, typer.Option("--controls", min=0, help="Of --choose: random directions reported beside it.")]


COEFFICIENTS, CANDIDATES, CONTROLS = "-1,-0.5,0.5,1", 3, 3


@dataclass(frozen=True)
class Grid:
    """What --choose tries.

    Attributes:
        coefficients: each is tried at every candidate.
        candidates: how many layers, unless --add-layers names them.
        floor, aim: see `probes.choose.choose`.
        task: None: the run's.
        controls: random directions on the reporting questions.
    """

    coefficients: tuple[float, ...]
    candidates: int
    floor: float | None
    aim: str
    task: str | None
    controls: int

    @classmethod
    def of(cls, choose: bool, coefficients: str, candidates: int, floor: float | None, aim: str, task: str | None, controls: int) -> Grid | None:  # fmt: skip
        """Return the grid, or None without --choose.

        Raises:
            SteerError: a coefficient that is no number, an unknown aim, or options of --choose without it.
        """
        from probes.compared import AIMS

        if not choose:
            if floor is not None or task is not None or (coefficients, candidates, controls) != (COEFFICIENTS, CANDIDATES, CONTROLS):  # fmt: skip
                raise SteerError(
                    "--coefficients, --candidates, --floor, --task or --controls was given without --choose, which they belong to",
                    "both or neither",
                    "Add --choose",
                )
            return None
        if aim not in AIMS:
            raise SteerError(f"--aim {aim} was asked for", f"one of {', '.join(AIMS)}")
        try:
            values = sorted({float(word) for word in coefficients.split(",") if word.strip()} - {0.0})
        except ValueError as error:
            raise SteerError(f"--coefficients is {coefficients!r}", "numbers between commas, such as -1,-0.5,0.5,1") from error  # fmt: skip
        if not values or not all(map(math.isfinite, values)):
            raise SteerError(f"--coefficients is {coefficients!r}", "at least one finite number that is not 0")
        return cls(tuple(values), candidates, floor, aim, task, controls)


def chosen_by(
    grid: Grid,
    model: SteerableModel,
    run: Traces,
    direction: Direction,
    summary: Summary,
    asked: Asked,
    output: Output,
) -> tuple[Choice, Judged]:
    """Try every point on the choosing questions, choose, and measure the chosen one on the reporting questions.

    Args:
        grid: what to try.
        model: unsteered.
        run: its graded replies; the unsteered model is taken from them.
        direction: made from the fit questions.
        summary: of these.
        asked: the verb's options.
        output: for the progress.

    Raises:
        SteerError: the run does not say its task, or as `probes.choose`.
    """
    from experiments.again import Again
    from probes.choose import PLAIN, choose, parts

    _, choosing, reporting = parts([trace.item for trace in run], seed=asked.seed)
    again = Again.of(model, run, grid.task)
    points = [(layers, c) for layers in _candidates(grid, direction, summary, asked) for c in grid.coefficients]
    replies: dict[Point, list[Trace]] = {PLAIN: [trace for trace in run if trace.item in choosing]}
    with output.progress("choose", len(points) + 1 + grid.controls) as bar:

        def steered(vectors: Direction, point: Point, items: frozenset[str]) -> list[Trace]:
            steering = adding(vectors, asked.add_at, point[0], coefficient=point[1], phase=asked.phase)
            bar.add(1)
            return again.ask(model.with_(steering), items)

        for point in points:
            replies[point] = steered(direction, point, choosing)
        choice = choose(replies, floor=grid.floor, aim=grid.aim, seed=asked.seed)
        best: Point = (choice.best.layers, choice.best.coefficient)
        plain = [trace for trace in run if trace.item in reporting]
        if best == PLAIN:
            return choice, choice.judged(plain, plain, seed=asked.seed)
        random = [direction.random_like(asked.seed + number) for number in range(1, grid.controls + 1)]
        controls = {f"random {n}": steered(each, best, reporting) for n, each in enumerate(random, 1)}
        return choice, choice.judged(plain, steered(direction, best, reporting), controls, seed=asked.seed)


def _candidates(grid: Grid, direction: Direction, summary: Summary, asked: Asked) -> list[tuple[int, ...]]:
    """The layers of --add-layers together, or the best by held-out area on the fit questions, each alone."""
    from probes.quality import quality

    if asked.add_layers is not None:
        return [tuple(asked.add_layers)]
    held = quality(direction, summary, draws=2, splits=2, resamples=2, seed=asked.seed).whole
    if held is None:
        return [(layer,) for layer in direction.layers]
    order = sorted(range(len(held.layers)), key=lambda place: (-(held.layers[place].value or 0.0), place))
    return [(direction.layers[place],) for place in sorted(order[: grid.candidates])]
