"""How many experts and how strongly: chosen on questions of their own, told on others, beside everything cheaper.

RICE (arXiv 2505.14681) scales the best l experts by beta and takes l and beta from a grid on the benchmark that it reports.
Here questions are cut into three parts that share none (`probes.choose.parts`): scores come from the first, number and beta
are chosen on the second under a rule (`probes.compared.first`), and what they do is told from the third alone, with several
sampling seeds, each model at the same random numbers. Beside the chosen experts stand

* the unsteered model;
* random experts, as many, at the same beta, never the chosen ones (RICE's control);
* frequency-matched experts: in the same layers, chosen as often (`ExpertScores.matched`);
* a prompt: a text in front of every question;
* a decoding constraint: a think policy, such as TIP (arXiv 2501.18585).

Several prompts or policies are chosen from on the second part, by the same rule without a floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.again import Again, answered
from experiments.expert_sweep_asking import (
    PLAIN,
    Asked,
    Job,
    baselines,
    best_of_each,
    matched_draws,
    place_of_first,
    scaled,
)
from experiments.expert_sweep_result import CHOSEN, Answered, ExpertSweep
from experiments.tasks.task import Task
from probes.choose import SHARES, parts
from probes.collect.plan import traces_hash
from probes.compared import AIMS, Answers, beyond
from probes.text import SWITCHES
from steer.errors import SteerError
from steer.expert_interventions import Expert, ScaleExperts
from steer.expert_scores import ExpertScores
from steer.identity import check_same
from steer.intervals import RESAMPLES, Interval
from steer.policy import Policy
from steer.traces import Traces

if TYPE_CHECKING:
    from steer.model import SteerableModel

BETAS, COUNTS, SEEDS, CONTROLS = (2.0, 4.0, 16.0, 64.0), (1, 2, 3, 5), 5, 3
Score = Callable[[Traces], ExpertScores]
Figures = dict[str, Interval]


def expert_sweep(
    model: SteerableModel,
    scores: ExpertScores | Score,
    run: Traces | Task | str,
    *,
    betas: Sequence[float] = BETAS,
    counts: Sequence[int] = COUNTS,
    seeds: int = SEEDS,
    aim: str = "accuracy",
    floor: float | None = None,
    controls: int = CONTROLS,
    prompts: Sequence[str] = (),
    policies: Sequence[Policy] | None = None,
    phase: str = "all",
    renormalise: bool = False,
    task: Task | str | None = None,
    limit: int | None = None,
    shares: Sequence[float] = SHARES,
    switches: Sequence[str] = SWITCHES,
    seed: int = 0,
    resamples: int = RESAMPLES,
    tell: Callable[[int], None] | None = None,
) -> ExpertSweep:
    """Choose how many of the best experts are scaled and by what, and tell what that does beside controls.

    Args:
        model: unsteered.
        scores: made from the fit questions or from other traces; or a function that makes them of the fit traces.
        run: graded replies of the model, which are the unsteered model on the choosing questions; or a task, asked now.
        betas: factors; 1 is the unsteered model and is left out.
        counts: numbers of experts, best first.
        seeds: replies per reporting question.
        aim, floor: the rule (`probes.compared.first`).
        controls: draws of random experts, and of frequency-matched ones as far as the layers have others.
        prompts: texts for the prompt baseline; none: it is left out.
        policies: decoding constraints; None: `experiments.expert_sweep_asking.usual_policies`; none: left out.
        phase, renormalise: of `ScaleExperts`.
        task: whose grader reads replies; None: the run's.
        limit: of the questions, where `run` is a task.
        shares: of the questions to fit, to choose and to report on.
        switches: words that begin another thought, for the column `thoughts`.
        seed: of the cut, of the controls and of the intervals; the sampling has the run's.
        resamples: of the intervals.
        tell: told after every model how many replies there were.

    Raises:
        SteerError: a grid that cannot be, scores of another model or made from the questions that decide, a run that
            cannot be asked again, or no point that reaches the floor.
    """
    betas, counts = _grid(betas, counts, seeds, controls, aim, phase)
    taken = run if isinstance(run, Traces) else answered(model, run, limit=limit, seed=seed)
    cut = parts([trace.item for trace in taken.require_some()], shares, seed)
    found, remarks = _scores(model, scores, taken, cut[0])
    _check_counts(found, counts, controls)
    again, options = Again.of(model, taken, task), {"resamples": resamples, "seed": seed}
    job = Job(model, again, tuple(switches), phase, renormalise, options, tell)
    plain = [trace for trace in taken if trace.item in cut[1]]
    cheaper, missing = baselines(job, plain, prompts, policies, aim)
    points = [scaled("tried", found.top(count), beta) for count in counts for beta in betas]
    tried, _ = job.measured([PLAIN, *points], cut[1], plain)
    chosen, least = place_of_first(tried, aim, floor)
    named = tried[chosen].experts or found.top(counts[-1])
    drawn = [found.random(len(named), seed + number, named) for number in range(1, controls + 1)]
    band = [scaled(f"random {n}", each, beta) for n, each in enumerate(drawn, 1) for beta in betas]
    beside, _ = job.measured([PLAIN, *band, *cheaper], cut[1], plain)
    shown = [each for each in beside[1:] if each.experts]
    rows = best_of_each(cheaper, beside[1 + len(shown) :], aim)
    if chosen:
        others, short = _others(found, tried[chosen], drawn, seed)
        rows, missing = [*others, *rows], [*missing, *short]
    report, tables = job.measured([PLAIN, *rows], cut[2], None, seeds)
    others_less, cheaper_less = _differences(report, tables, options)
    return ExpertSweep(
        tried=tuple(tried),
        chosen=chosen,
        floor=least,
        aim=aim,
        band=tuple(shown),
        baselines=tuple(beside[1 + len(shown) :]),
        report=tuple(report),
        beyond=others_less,
        against=cheaper_less,
        questions=(len(cut[0]), len(cut[1]), len(cut[2])),
        seeds=seeds,
        remarks=(*remarks, *missing, *job.broken),
        phase=phase,
        renormalise=renormalise,
        model=model.identity,
    )


def _grid(betas: Sequence[float], counts: Sequence[int], seeds: int, controls: int, aim: str, phase: str) -> tuple[tuple[float, ...], tuple[int, ...]]:  # fmt: skip
    """Return betas and counts, increasing, each once."""
    if aim not in AIMS:
        raise SteerError(f"the aim is {aim!r}", f"one of {', '.join(AIMS)}")
    for beta in betas:
        ScaleExperts(((0, 0),), beta, phase=phase)
    factors, numbers = tuple(sorted({float(beta) for beta in betas} - {1.0})), tuple(sorted({*counts}))
    if not factors or not numbers or numbers[0] < 1:
        raise SteerError(
            f"the grid has the betas {list(betas)} and the numbers of experts {list(counts)}",
            "at least one beta that is not 1, and numbers of 1 or more",
        )
    if seeds < 1 or controls < 0:
        raise SteerError(f"{seeds} seeds and {controls} controls were asked for", "1 or more, and 0 or more")
    return factors, numbers


def _scores(model: SteerableModel, scores: ExpertScores | Score, run: Traces, fit: frozenset[str]) -> tuple[ExpertScores, list[str]]:  # fmt: skip
    """Return the scores, and what is not known of where they come from."""
    own = run.where(lambda trace: trace.item in fit)
    if not isinstance(scores, ExpertScores):
        found = scores(own)
        check_same(found.model, model.identity, "these expert scores")
        return found, []
    check_same(scores.model, model.identity, "these expert scores")
    source = scores.provenance.get("data_hash")
    if source == traces_hash(run):
        raise SteerError(
            "the expert scores were made from all questions of the run, those that decide and those of the report among them",
            "scores from the questions to fit, or from another run",
            "Hand over a function that makes them (scores=lambda traces: …), or use steer probe experts --choose",
        )
    if source == traces_hash(own):
        return scores, []
    return scores, ["The scores come from other traces; whether these hold questions of this run is not known."]


def _check_counts(scores: ExpertScores, counts: Sequence[int], controls: int) -> None:
    most = len(scores.ranked) // 2 if controls else len(scores.ranked)
    if counts[-1] > most:
        raise SteerError(
            f"{counts[-1]} experts are to be scaled and {len(scores.ranked)} are scored",
            f"at most {most}{', so that as many others can stand beside them' * bool(controls)}",
            "Try fewer experts (counts=, --counts)",
        )


def _others(scores: ExpertScores, best: Answered, drawn: Sequence[tuple[Expert, ...]], seed: int) -> tuple[list[Asked], list[str]]:  # fmt: skip
    """Return the chosen experts and the controls, all at the chosen beta, and what is missing."""
    matched, short = matched_draws(scores, best.experts, len(drawn), seed)
    sets = {CHOSEN: best.experts}
    sets |= {f"random {n}": each for n, each in enumerate(drawn, 1)}
    sets |= {f"matched {n}": each for n, each in enumerate(matched, 1)}
    return [scaled(name, each, best.beta) for name, each in sets.items()], short


def _differences(report: Sequence[Answered], tables: Sequence[Answers], options: Mapping[str, int]) -> tuple[Figures | None, dict[str, Figures]]:  # fmt: skip
    """Return the chosen experts less the mean of the controls, and less each baseline; nothing where none were chosen."""
    by_name = {each.name: table for each, table in zip(report, tables, strict=True)}
    others = [table for name, table in by_name.items() if name.startswith(("random", "matched"))]

    def less(others: Sequence[Answers]) -> Figures:
        return {name: beyond(by_name[CHOSEN], others, name, **options) for name in others[0].columns}

    cheaper = [name for name in ("prompt", "decoding") if name in by_name and CHOSEN in by_name]
    return less(others) if others else None, {name: less([by_name[name]]) for name in cheaper}
