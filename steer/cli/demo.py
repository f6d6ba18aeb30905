"""`steer demo`: the whole loop on the bundled organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options import Json, Quiet, Seed
from steer.cli.output import Output
from steer.errors import SteerError

Folder = Annotated[
    Path | None,
    typer.Option(
        "--out", show_default="demo", help="A new folder. Without --out an earlier demo in demo/ is replaced."
    ),
]
Moe = Annotated[bool, typer.Option("--moe", help="On the mixture-of-experts organism (not in this version).")]


def command(out: Folder = None, moe: Moe = False, seed: Seed = 0, json: Json = False, quiet: Quiet = False) -> None:
    """Evaluate, steer, edit, verify and report on the bundled organism: a minute and a half without a GPU or a download."""
    from experiments.bench import clear_own
    from experiments.demo import demo

    if moe:
        raise SteerError(
            "the demo was asked for on organism:chain-moe, which is not bundled in this version",
            "the dense organism",
            "Leave out --moe",
        )
    output = Output(json, quiet)
    folder = Path("demo") if out is None else out
    if out is None:
        clear_own(folder)
    with output.progress("demo") as bar:
        result = demo(
            folder, seed, tell=lambda label, done, total, note: bar.to(done, total, f"{label} {note}".strip())
        )
    for line in result.sentences():
        output.text(f"{line}\n")
    output.text(f"Report: {result.report}\nCheckpoint: {result.checkpoint}\n{result.seconds:.0f} seconds")
    output.result(result.to_dict())
