"""`steer apply`: write a patched checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edits.checkpoint.plan import plan
from steer.cli.options import Json, Model, Quiet, Resume, Seed
from steer.cli.output import Output
from steer.errors import SteerError
from steer.patches import Patch
from steer.sources import locate
from steer.subjects import load_change


def command(
    model: Model,
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch, or a steering that has a patch form.")],
    out: Annotated[Path | None, typer.Option("--out", help="The new folder.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done; reads headers.")] = False,
    resume: Resume = False,
    link: Annotated[bool, typer.Option("--link", help="Share untouched files with the base by hard links.")] = False,
    keep_undo: Annotated[
        bool, typer.Option("--keep-undo", help="Store the original columns, so that revert needs no base.")
    ] = False,
    anatomy: Annotated[Path | None, typer.Option("--anatomy", help="Your record of an unknown family.")] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a patched checkpoint: an ordinary folder with every file of the base. The base is never changed."""
    output = Output(json, quiet)
    change = load_change(patch)
    made = plan(change if isinstance(change, Patch) else Patch.from_steering(change), locate(model).folder, anatomy)
    report = {
        "patch": made.patch.fingerprint,
        "base": str(made.folder),
        "coverage": made.coverage,
        "tensors": [tensor.name for tensor in made.touched],
        "bytes_edited": made.bytes_edited,
        "bytes_to_write": made.bytes_to_write,
        "loads": made.loads,
    }
    if dry_run:
        output.text(str(made))
        output.result(report | {"checkpoint": None})
        return
    if out is None:
        raise SteerError("no output was named", "--out FOLDER", "Or see what would be done with --dry-run")
    with output.progress("writing", made.bytes_to_write) as bar:
        done = made.apply(out, resume=resume, link=link, keep_undo=keep_undo, progress=bar.add)
    output.table(
        done.summary(),
        ["matrix", "tensor", "survived", "cosine"],
        [(t.matrix, t.name, t.survived, t.cosine) for t in done.manifest.tensors],
    )
    output.result(report | {"checkpoint": str(done.path), "survived": done.survived, "undo": done.manifest.undo})
