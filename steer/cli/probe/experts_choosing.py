"""`steer probe experts --choose`: how many experts and how strongly, on questions of their own, told on yet others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.lists import numbers
from steer.cli.output import Output
from steer.cli.probe.asking import check_maker
from steer.cli.probe.source import drawable, is_summary
from steer.errors import SteerError

if TYPE_CHECKING:
    from experiments.expert_sweep_result import ExpertSweep
    from steer.expert_scores import ExpertScores
    from steer.model import SteerableModel
    from steer.policy import Policy
    from steer.traces import Traces

BETAS, COUNTS, SEEDS, CONTROLS, NO_POLICY = "2,4,16,64", "1,2,3,5", 5, 3, "none"

Choose = Annotated[
    bool,
    typer.Option(
        "--choose",
        help="Score on a part of the run's questions, choose number and beta on another, report on the third.",
    ),
]
Betas = Annotated[str, typer.Option("--betas", help="Of --choose: factors, between commas.")]
Counts = Annotated[str, typer.Option("--counts", help="Of --choose: numbers of experts, best first, between commas.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Of --choose: replies to each question of the report.")]
Controls = Annotated[
    int,
    typer.Option(
        "--controls", min=0, help="Of --choose: draws of random experts, and of others that are chosen as often."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", show_default=False, help="Of --choose: a text before every question, reported beside it; repeat for several."),
]  # fmt: skip
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        show_default="tip:3:600 where the tokenizer has its word, else minima or budgets",
        help="Of --choose: a decoding constraint, as for steer generate, reported beside it; repeat for several; none leaves it out.",
    ),
]
Switches = Annotated[
    list[str] | None,
    typer.Option("--switch", show_default="alternatively, another way, …", help="Of --choose: a word that begins another thought; repeat for several."),
]  # fmt: skip
PhaseName = Annotated[str, typer.Option("--phase", help="Of --choose: when experts are scaled, such as thinking.")]
Renormalise = Annotated[bool, typer.Option("--renormalise", help="Of --choose: keep the sum of a token's weights.")]
SteeringFile = Annotated[
    Path | None,
    typer.Option(
        "--steering", show_default=False, help="Of --choose: also write the chosen scaling as a steering (.yaml)."
    ),
]
SweepPicture = Annotated[
    Path | None,
    typer.Option("--sweep", show_default=False, help="Of --choose: draw accuracy, length and repetition against beta.", callback=drawable),
]  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The options of --choose as typed; empty ones take what `experiments.expert_sweep` does.

    Attributes:
        betas, counts: between commas.
        seeds, aim, floor, controls, prompts, policies, switches, phase, renormalise, task: see there.
        steering, picture: files to write.
    """

    betas: str = BETAS
    counts: str = COUNTS
    seeds: int = SEEDS
    aim: str = "accuracy"
    floor: float | None = None
    controls: int = CONTROLS
    prompts: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    phase: str = "all"
    renormalise: bool = False
    task: str | None = None
    steering: Path | None = None
    picture: Path | None = None

    def checked(self, choose: bool) -> Grid | None:
        """Return the grid, or None without --choose; refuse before a model is loaded what cannot be.

        Raises:
            SteerError: options of --choose without it, an unknown aim or phase, or a steering's name that is no .yaml.
        """
        from probes.compared import AIMS
        from steer.phases import check_phase

        if not choose:
            if self != Grid():
                raise SteerError(
                    "an option of --choose, such as --betas, --counts, --prompt or --steering, was given without it",
                    "both or neither",
                    "Add --choose",
                )
            return None
        if self.aim not in AIMS:
            raise SteerError(f"--aim {self.aim} was asked for", f"one of {', '.join(AIMS)}")
        if self.steering is not None and self.steering.suffix != ".yaml":
            raise SteerError(f"--steering names {self.steering}", "a name that ends in .yaml", "For example --steering up.yaml")  # fmt: skip
        check_phase(self.phase, None)
        self.factors(), self.numbers()
        return self

    def factors(self) -> tuple[float, ...]:
        """Read the betas."""
        try:
            values = sorted({float(word) for word in self.betas.split(",") if word.strip()} - {1.0})
        except ValueError as error:
            raise SteerError(f"--betas is {self.betas!r}", "numbers between commas, such as 2,4,16,64") from error
        if not values or not all(map(math.isfinite, values)) or values[0] < 0:
            raise SteerError(f"--betas is {self.betas!r}", "at least one finite number of 0 or more that is not 1")
        return tuple(values)

    def numbers(self) -> tuple[int, ...]:
        """Read the numbers of experts."""
        found = numbers([self.counts], "experts")
        if not found or found[0] < 1:
            raise SteerError(f"--counts is {self.counts!r}", "numbers of 1 or more between commas, such as 1,2,3,5")
        return tuple(found)

    def constraints(self, model: SteerableModel) -> tuple[Policy, ...] | None:
        """Read the policies; None for the usual ones."""
        from experiments.think_policies import parse_policy

        if not self.policies:
            return None
        named = [text for text in self.policies if text != NO_POLICY]
        return tuple(parse_policy(text, model.marks, model.tokenizer) for text in named)


def fit_part(model: SteerableModel, source: Path, seed: int) -> tuple[Traces, Traces]:
    """Return the run, and its replies to the questions that scores are made from.

    Raises:
        SteerError: a summary, or a run of another model.
    """
    from probes.choose import parts
    from steer.traces import Traces

    if is_summary(source):
        raise SteerError(
            f"--choose was asked for with the summary {source}, which cannot be asked anything again",
            "a run, whose questions are cut into parts to fit, to choose and to report on",
            "Give the run folder to --from",
        )
    run = Traces.load(source, model.tokenizer).require_some()
    check_maker(model, run.meta, source, "Evaluate the subject, or leave --choose out")
    fit = parts([trace.item for trace in run], seed=seed)[0]
    return run, run.where(lambda trace: trace.item in fit)


def swept(grid: Grid, model: SteerableModel, scores: ExpertScores, run: Traces, seed: int, output: Output) -> ExpertSweep:  # fmt: skip
    """Run the sweep and write what was asked for; arguments and errors as `experiments.expert_sweep`."""
    from experiments.expert_sweep import expert_sweep
    from probes.text import SWITCHES
    from steer.files import replacing

    policies = grid.constraints(model)
    with output.progress("sweep, models asked") as bar:
        found = expert_sweep(
            model,
            scores,
            run,
            betas=grid.factors(),
            counts=grid.numbers(),
            seeds=grid.seeds,
            aim=grid.aim,
            floor=grid.floor,
            controls=grid.controls,
            prompts=grid.prompts,
            policies=policies,
            phase=grid.phase,
            renormalise=grid.renormalise,
            task=grid.task,
            switches=grid.switches or SWITCHES,
            seed=seed,
            tell=lambda _: bar.add(1),
        )
    if grid.steering is not None and found.steering is not None:
        found.steering.save(grid.steering)
    if grid.picture is not None:
        with replacing(grid.picture) as partial:
            found.plot().savefig(partial, format=grid.picture.suffix[1:] or "png")
    return found


def tell(found: ExpertSweep, grid: Grid, subject: str, output: Output) -> dict[str, Any]:
    """Print the tables and the sentences, and return them as plain data."""
    from experiments.expert_sweep_result import cells

    output.table(f"Tried on {found.questions[1]} questions", *cells([*found.tried, *found.band, *found.baselines]))
    output.table(f"On {found.questions[2]} other questions, {found.seeds} seeds each", *cells(found.report))
    for sentence in found.sentences():
        output.text(sentence)
    if grid.steering is not None and found.steering is None:
        output.remark(f"No scaling was better than none, so {grid.steering} was not written.")
    elif grid.steering is not None:
        output.remark(f"Steer with it: steer generate {subject}+{grid.steering} …")
    return found.to_dict()
