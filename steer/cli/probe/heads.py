"""`steer probe heads`: how much each attention head writes against a direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options import Json, Model, Out, Quiet, Seed
from steer.cli.output import Output
from steer.cli.probe.source import From, Picture, refuse_existing, summary_for

DirectionFile = Annotated[Path, typer.Option("--direction", show_default=False, help="Made by `steer probe length`.")]
Top = Annotated[int, typer.Option("--top", min=1, help="Heads in the table and in the picture's frames.")]
Group = Annotated[str, typer.Option("--group", help="Traces whose writes are scored: short, long or all.")]
Permutations = Annotated[int, typer.Option("--permutations", min=0, help="Shuffles of the labels for the interval.")]


def command(
    model: Model,
    source: From,
    direction: DirectionFile,
    out: Out,
    top: Top = 10,
    group: Group = "short",
    permutations: Permutations = 200,
    plot: Picture = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every attention head: how much it writes against a direction in short thoughts."""
    from probes.directions import rule_of
    from probes.heads import head_scores
    from steer.directions import Direction
    from steer.files import replacing
    from steer.subjects import open_subject

    output = Output(json, quiet)
    refuse_existing(out, plot)
    found = Direction.load(direction)
    _, span = rule_of(found)
    opened = open_subject(model)
    summary = summary_for(opened, source, (found.site, "z"), span, output)
    scores = head_scores(summary, found, opened, group=group, permutations=permutations, seed=seed)
    scores.save(out)
    rows = scores.rows()[:top]
    if plot is not None:
        with replacing(plot) as partial:
            figure = scores.plot([(int(row["layer"]), int(row["head"])) for row in rows])
            figure.savefig(partial, format=plot.suffix[1:] or "png")
    stability = "unknown" if scores.stability is None else f"{scores.stability:.3f}"
    title = f"{out}: {len(scores.ranked)} heads; rank correlation of two halves {stability}"
    output.table(title, list(rows[0]), [list(row.values()) for row in rows])
    output.result({"scores": out, "stability": scores.stability, "heads": rows, "fingerprint": scores.fingerprint})
