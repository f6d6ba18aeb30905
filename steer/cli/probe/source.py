"""What a probe reads: a summary, or a run that is read now, only as far as the probe needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.collect import follow
from steer.cli.output import Output

if TYPE_CHECKING:
    from probes.collect.summary import Summary
    from steer.model import SteerableModel

From = Annotated[
    Path, typer.Option("--from", show_default=False, help="A run (it is read now) or a summary of `steer collect`.")
]
Picture = Annotated[
    Path | None, typer.Option("--plot", show_default=False, help="Draw a picture into this file (.png, .svg, .pdf).")
]


def is_summary(source: Path) -> bool:
    """Whether a path holds a summary, finished or not."""
    return (source / "summary.yaml").is_file() or (
        (source / "journal").is_dir() and not (source / "run.yaml").is_file()
    )


def summary_for(model: SteerableModel, source: Path, sites: Sequence[str], span: str, output: Output) -> Summary:
    """Return the summary at `source`, or one of the run there, made in memory.

    Raises:
        SteerError: neither is there, or it does not belong to the model.
    """
    from probes.collect.run import collect
    from probes.collect.summary import Summary
    from steer.traces import Traces

    if is_summary(source):
        summary = Summary.load(source)
        summary.check_model(model.identity)
        return summary
    traces = Traces.load(source)
    with output.progress("collect") as bar:
        return collect(model, traces, sites=sites, spans=(span,), progress=follow(output, bar))


def refuse_existing(*paths: Path | None) -> None:
    """Refuse, before anything runs, to write over a file.

    Raises:
        SteerError: one of them exists.
    """
    from steer import files

    for path in paths:
        if path is not None:
            files.refuse_existing(path, overwrite=False)
