"""`steer patch direction`: a steering as a patch of weights, where it has that form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edits.checkpoint.apply import pin
from edits.checkpoint.plan import plan
from steer.cli.options import Json, Out, Quiet, Seed
from steer.cli.output import Output
from steer.files import refuse_existing
from steer.patches import Patch
from steer.sources import locate
from steer.steering import Steering


def command(
    steering: Annotated[
        Path, typer.Argument(metavar="STEERING", show_default=False, help="A steering, name.yaml beside its vectors.")
    ],
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", show_default=False, help="A hub id, a folder, or organism:chain."),
    ],
    out: Out,
    untie: Annotated[
        bool, typer.Option("--untie", help="The result gets a vocabulary head of its own (`steer apply --untie`).")
    ] = False,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a steering into a patch of weights and biases, refused by name where weights cannot say it."""
    refuse_existing(out, overwrite=False)
    output = Output(json, quiet)
    change, folder = Steering.load(steering), locate(model).folder
    made = plan(Patch.from_steering(change, folder, untie=untie), folder, untie=untie)
    patch = pin(made)
    patch.save(out)
    option = " --untie" if untie else ""
    output.text(f"{out}: {patch}\n{made.coverage}\nApply it with `steer apply {model} {out}{option} --out FOLDER`")
    output.result(
        {
            "patch": str(out),
            "fingerprint": patch.fingerprint,
            "steering": change.fingerprint,
            "operations": [operation.as_json() for operation in patch.operations],
            "coverage": made.coverage,
        }
    )
