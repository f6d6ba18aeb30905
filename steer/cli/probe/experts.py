"""`steer probe experts`: which experts of a mixture fire at the tokens that open, close or turn a thought."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.options import Json, Model, Out, Quiet, Seed
from steer.cli.output import Output
from steer.cli.probe.choosing import Aim, Floor, Task
from steer.cli.probe.experts_choosing import (
    BETAS,
    CONTROLS,
    COUNTS,
    SEEDS,
    Betas,
    Choose,
    Controls,
    Counts,
    Grid,
    PhaseName,
    Policies,
    Prompts,
    Renormalise,
    Seeds,
    SteeringFile,
    SweepPicture,
    Switches,
    fit_part,
    swept,
    tell,
)
from steer.cli.probe.source import From, Picture, drawable, is_summary, refuse_existing, summary_for
from steer.errors import SteerError

if TYPE_CHECKING:
    from probes.collect.summary import Summary
    from steer.expert_scores import ExpertScores
    from steer.model import SteerableModel
    from steer.traces import Traces

TURN = "Alternatively"
"""RICE's word for another thought; taken by itself only where the traces hold it."""

UNLIKE = "the markers choose them more often than random tokens of their traces would, as many words do; whether they matter for thinking, scaling them tells (--choose)"  # fmt: skip
ALIKE = "the markers are not seen to choose any expert more often than random tokens of their traces would"

Markers = Annotated[
    list[str] | None,
    typer.Option(
        "--marker",
        metavar="[-]TEXT[,TEXT…]",
        show_default="the model's marks, and -Alternatively where it stands",
        help="What is looked at, with - before it where it counts against an expert; repeat for several.",
    ),
]
Method = Annotated[str, typer.Option("--method", help="npmi (RICE), pmi, risk_difference (SteerMoE) or rate_ratio.")]
Top = Annotated[int, typer.Option("--top", min=1, help="Experts in the table, with rings in the map.")]
Resamples = Annotated[int, typer.Option("--resamples", min=0, help="Of the questions, for the interval; 0 leaves it out.")]  # fmt: skip
Null = Annotated[bool, typer.Option("--null/--no-null", help="Chances, were the markers anywhere in their traces; and false discoveries.")]  # fmt: skip
Correction = Annotated[str, typer.Option("--correction", help="Of the chances: bh, or by, which holds whatever depends on what.")]  # fmt: skip
Volcano = Annotated[Path | None, typer.Option("--volcano", show_default=False, help="Draw scores against chances into this file.", callback=drawable)]  # fmt: skip


def command(
    model: Model,
    source: From,
    out: Out,
    marker: Markers = None,
    method: Method = "npmi",
    top: Top = 10,
    resamples: Resamples = 1000,
    null: Null = True,
    correction: Correction = "bh",
    plot: Picture = None,
    volcano: Volcano = None,
    choose: Choose = False,
    betas: Betas = BETAS,
    counts: Counts = COUNTS,
    aim: Aim = "accuracy",
    floor: Floor = None,
    seeds: Seeds = SEEDS,
    controls: Controls = CONTROLS,
    prompt: Prompts = None,
    policy: Policies = None,
    switch: Switches = None,
    phase: PhaseName = "all",
    renormalise: Renormalise = False,
    task: Task = None,
    steering: SteeringFile = None,
    sweep: SweepPicture = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every expert of a mixture: how closely its being chosen goes with the markers of thinking."""
    from probes.experts.formulas import method as known_method
    from probes.experts.score import expert_scores, known_correction
    from steer.subjects import open_subject

    output = Output(json, quiet)
    known_method(method)
    known_correction(correction)
    if volcano is not None and not null:
        raise SteerError("--volcano was given with --no-null", "chances to draw", "Leave one of them out")
    named = None if marker is None else _parsed(marker)
    grid = Grid(
        betas, counts, seeds, aim, floor, controls, tuple(prompt or ()), tuple(policy or ()), tuple(switch or ()), phase,
        renormalise, task, steering, sweep,
    ).checked(choose)  # fmt: skip
    refuse_existing(out, plot, volcano, steering, sweep)
    opened = open_subject(model)
    _require_experts(opened)
    run, read = (None, source) if grid is None else fit_part(opened, source, seed)
    markers, summary = _read(opened, read, named, output)
    scores = expert_scores(
        summary, markers, method=method, resamples=resamples, null=null, correction=correction, seed=seed, model=opened
    )
    found = None if grid is None or run is None else swept(grid, opened, scores, run, seed, output)
    scores.save(out)
    top = min(top, len(scores.ranked))
    _draw(scores, top, plot, volcano)
    told = _told_scores(scores, out, top, output)
    if found is not None and grid is not None:
        told["sweep"] = tell(found, grid, model, output)
    output.result(told)


def _parsed(texts: list[str]) -> dict[str, float]:
    """Read `TEXT`, `+TEXT` and `-TEXT`."""
    found: dict[str, float] = {}
    for text in texts:
        name = text[1:] if text[:1] in "+-" else text
        if not name.strip() or name in found:
            raise SteerError(
                f"--marker {text!r} names {'nothing' if not name.strip() else 'a marker again'}",
                "a text, each once",
                "For example --marker '<think>' --marker '-</think>'",
            )
        found[name] = -1.0 if text.startswith("-") else 1.0
    return found


def _require_experts(model: SteerableModel) -> None:
    anatomy = model.anatomy
    if not anatomy.expert_layers:
        raise SteerError(
            f"{model.name}, a {anatomy.family} model, has no experts",
            "a mixture of experts",
            "For a dense model, ask `steer probe heads` or `steer probe length`",
        )


def _read(
    model: SteerableModel, source: Path | Traces, named: Mapping[str, float] | None, output: Output
) -> tuple[dict[str, float], Summary]:
    """Return the markers and the summary that counts them, made now where the source is a run."""
    from probes.collect.summary import Summary
    from probes.experts.counts import marks_as_markers, occurrences, recorder_for, resolved, span_of
    from steer.spans import marker_variants

    if named is not None:
        for text in named:
            resolved(text, model.tokenizer)
        return dict(named), summary_for(model, source, (), "", output, [recorder_for(named)])
    markers = marks_as_markers(model.marks, model.tokenizer)
    with_turn = {**markers, TURN: -1.0}
    if not marker_variants(TURN, model.tokenizer):
        output.remark(f"{TURN!r} is no word of this model's tokenizer, so it is no marker.")
        return markers, summary_for(model, source, (), "", output, [recorder_for(markers)])
    summary = summary_for(model, source, (), "", output, [recorder_for(with_turn)])
    if (
        isinstance(source, Path)
        and is_summary(source)
        and f"router.count/{span_of(TURN)}" not in Summary.load(source).quantities
    ):
        output.remark(f"The summary does not count {TURN!r}, so it is no marker.")
        return markers, summary
    held = occurrences(summary, TURN)
    output.remark(f"{TURN!r} stands at {held} tokens, so it is {'a marker' if held else 'no marker'}.")
    return (with_turn if held else markers), summary


def _draw(scores: ExpertScores, top: int, plot: Path | None, volcano: Path | None) -> None:
    from steer.files import replacing

    if plot is not None:
        with replacing(plot) as partial:
            scores.plot(scores.top(top)).savefig(partial, format=plot.suffix[1:] or "png")
    if volcano is not None:
        with replacing(volcano) as partial:
            scores.volcano(scores.top(min(top, 5))).savefig(partial, format=volcano.suffix[1:] or "png")


def _told_scores(scores: ExpertScores, out: Path, top: int, output: Output) -> dict[str, Any]:
    rows = [_told(row) for row in scores.rows()[:top]]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    title = f"{out}: {scores.method} of {scores.formula}, {len(scores.ranked)} experts of {len(scores.layers)} layers, {scores.tokens} tokens"
    output.table(title, [name.replace("_", " ") for name in rows[0]], cells)
    written = [[marker.text, marker.sign, marker.marked, _variants(marker.variants, marker.written)] for marker in scores.markers]  # fmt: skip
    output.table("", ["marker", "weight", "tokens", "written as"], written)
    ties = scores.ties(top)
    if ties:
        output.text(f"{len(ties)} other experts have the score of the last one here, such as {ties[0]}: only their numbers decide.")  # fmt: skip
    found = None if scores.q_value is None else int((scores.q_value <= 0.05).sum())
    if found is not None:
        output.text(f"{found} of {len(scores.ranked)} experts have q ≤ 0.05: {UNLIKE if found else ALIKE}.")
    markers = [
        {"text": marker.text, "weight": marker.sign, "tokens": marker.marked, "ids": marker.variants, "written": marker.written}
        for marker in scores.markers
    ]  # fmt: skip
    return {
        "scores": out,
        "method": scores.method,
        "tokens": scores.tokens,
        "markers": markers,
        "experts": rows,
        "ties": ties,
        "significant": found,
        "scored": len(scores.ranked),
        "fingerprint": scores.fingerprint,
    }


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its interval in one cell."""
    told = {key: value for key, value in row.items() if key not in ("lower", "upper")}
    if "lower" in row:
        told = {"layer": row["layer"], "expert": row["expert"], "score": row["score"], "interval": [row["lower"], row["upper"]], **told}  # fmt: skip
    return told


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "–" if None in value else f"[{value[0]:.3f}, {value[1]:.3f}]"
    return value


def _variants(variants: tuple[tuple[int, ...], ...], written: tuple[str, ...]) -> str:
    return "; ".join(f"{text!r} {list(ids)}" for ids, text in zip(variants, written, strict=True))
