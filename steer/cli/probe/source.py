"""What a probe reads: a summary, or a run that is read now, only as far as the probe needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.collect import CACHE, follow
from steer.cli.output import Output
from steer.errors import SteerError

if TYPE_CHECKING:
    from probes.collect.recorders import Recorder
    from probes.collect.summary import Summary
    from steer.model import SteerableModel
    from steer.traces import Traces

From = Annotated[
    Path, typer.Option("--from", show_default=False, help="A run (it is read now) or a summary of `steer collect`.")
]


def drawable(path: Path | None) -> Path | None:
    """Refuse, before anything runs, a picture that nothing could draw."""
    if path is not None and path.suffix.lower() not in ("", ".png", ".svg", ".pdf"):
        raise SteerError(f"the picture {path} ends in {path.suffix}", ".png, .svg or .pdf", "Name it so")
    return path


Picture = Annotated[
    Path | None,
    typer.Option(
        "--plot", show_default=False, help="Draw a picture into this file (.png, .svg, .pdf).", callback=drawable
    ),
]


def is_summary(source: Path) -> bool:
    """Whether a path holds a summary, finished or not."""
    return (source / "summary.yaml").is_file() or (
        (source / "journal").is_dir() and not (source / "run.yaml").is_file()
    )


def summary_for(
    model: SteerableModel,
    source: Path | Traces,
    sites: Sequence[str],
    span: str,
    output: Output,
    recorders: Sequence[Recorder] | None = None,
) -> Summary:
    """Return the summary at `source`, or one of the run there, made in memory.

    Args:
        model: that reads the run, or that the summary must belong to.
        source: a summary or a run; a run's traces, too.
        sites: what a run is read for, with `span`.
        span: positions that are averaged.
        output: where progress and remarks go.
        recorders: for what a run is read, instead.

    Raises:
        SteerError: neither is there, or it does not belong to the model.
    """
    from probes.collect.run import collect
    from probes.collect.summary import Summary

    if isinstance(source, Path) and is_summary(source):
        summary = Summary.load(source)
        summary.check_model(model.identity)
        return summary
    with output.progress("collect") as bar:
        told = follow(output, bar)
        return collect(
            model, source, sites=sites, spans=(span,), recorders=recorders, cache=cache_folder(), progress=told
        )


def cache_folder() -> str | None:
    """Return the cache that the environment names, for a verb that reads a run; None where it names none."""
    return os.environ.get(CACHE) or None


def refuse_existing(*paths: Path | None) -> None:
    """Refuse, before anything runs, to write over a file.

    Raises:
        SteerError: one of them exists.
    """
    from steer import files

    for path in paths:
        if path is not None:
            files.refuse_existing(path, overwrite=False)
