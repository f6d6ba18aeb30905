"""`steer apply`: write a patched checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edits.checkpoint.apply import Edited
from edits.checkpoint.card import HALF, lost
from edits.checkpoint.plan import Plan, plan
from steer.anatomy.headers import read_headers
from steer.anatomy.record import read_record
from steer.anatomy.resolve import resolve
from steer.cli.options import Json, Model, Quiet, Resume, Seed
from steer.cli.output import Output
from steer.errors import SteerError
from steer.patches import Patch
from steer.sources import locate
from steer.subjects import load_change, parse

SHOWN = 24


class Hashed(StrEnum):
    """Which files are hashed."""

    TOUCHED = "touched"
    ALL = "all"


class Wide(StrEnum):
    """What 16-bit tensors can become."""

    FLOAT32 = "float32"


def command(
    model: Model,
    patch: Annotated[
        list[str],
        typer.Argument(
            metavar="PATCH[@SCALE]…",
            help="Patches, steerings that have a patch form, or adapters; several are composed in this order.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The new folder.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done; reads headers.")] = False,
    resume: Resume = False,
    link: Annotated[bool, typer.Option("--link", help="Share untouched files with the base by hard links.")] = False,
    keep_undo: Annotated[
        bool, typer.Option("--keep-undo", help="Store the original numbers, so that revert needs no base.")
    ] = False,
    hashed: Annotated[
        Hashed, typer.Option("--hash", help="Which files are hashed: those with touched tensors in them, or all.")
    ] = Hashed.TOUCHED,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Go on with another base than the patch's, and say what differs.")
    ] = False,
    dtype: Annotated[
        Wide | None,
        typer.Option("--dtype", help="Widen 16-bit tensors, so that a small change survives.", show_default=False),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option("--untie", help="Give a tied model a vocabulary head of its own, as it was before the patch."),
    ] = False,
    anatomy: Annotated[Path | None, typer.Option("--anatomy", help="Your record of an unknown family.")] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a patched checkpoint: an ordinary folder with every file of the base. The base is never changed."""
    output = Output(json, quiet)
    folder = locate(model).folder
    named = [change for text in patch for change in parse(f"model+{text}").changes]
    patches = [_patch(path, scale, (model, folder, anatomy), untie) for path, scale in named]
    wide = None if dtype is None else dtype.value
    made = plan(patches, folder, anatomy, dtype=wide, force_base=force_base, untie=untie)
    report = _report(made)
    if dry_run:
        output.text(str(made))
        output.result(report | {"checkpoint": None})
        return
    if out is None:
        raise SteerError("no output was named", "--out FOLDER", "Or see what would be done with --dry-run")
    for line in made.summary() if len(patches) > 1 or made.created or made.config else []:
        output.remark(line)
    with output.progress("writing", made.bytes_to_write) as bar:
        done = made.apply(
            out, resume=resume, link=link, keep_undo=keep_undo, hash_all=hashed is Hashed.ALL, progress=bar.add
        )
    _show(done, output)
    output.result(report | _outcome(done))


def _patch(path: Path, scale: float, base: tuple[str, Path, Path | None], untie: bool) -> Patch:
    """Read one change as a patch of the base (as it was named, its folder, a record of the user's own)."""
    model, folder, anatomy = base
    change = load_change(path, model, anatomy)
    if isinstance(change, Patch):
        found = change
    elif anatomy is None:
        found = Patch.from_steering(change, folder, untie=untie)
    else:
        headers = read_headers(folder)
        found = Patch.from_steering(change, resolve(headers.config, headers.shapes, read_record(anatomy)), untie=untie)
    return found if scale == 1 else found.scaled(scale)


def _report(made: Plan) -> dict[str, Any]:
    return {
        "patch": made.patch.fingerprint,
        "base": str(made.folder),
        "coverage": made.coverage,
        "tensors": [tensor.name for tensor in made.touched],
        "created": [{"name": tensor.name, "why": tensor.created} for tensor in made.created],
        "config": dict(made.config),
        "dtype": made.dtype,
        "conflicts": made.conflicts.to_dict(),
        "bytes_edited": made.bytes_edited,
        "bytes_to_write": made.bytes_to_write,
        "bytes_undo": made.bytes_undo,
        "loads": made.loads,
    }


def _outcome(done: Edited) -> dict[str, Any]:
    manifest = done.manifest
    rows = [
        {
            "name": t.name,
            "matrix": t.matrix,
            "wanted": t.wanted,
            "survived": t.survived,
            "cosine": t.cosine,
            "lost": lost(t),
        }
        for t in manifest.edited
    ]
    return {
        "checkpoint": str(done.path),
        "survived": done.survived,
        "surviving": rows,
        "lost_more_than_half": sum((lost(tensor) or 0.0) > HALF for tensor in manifest.edited),
        "forced": list(manifest.forced),
        "undo": manifest.undo,
    }


def _show(done: Edited, output: Output) -> None:
    edited = done.manifest.edited
    rows = [(t.matrix, t.name, t.survived, t.cosine) for t in edited[:SHOWN]]
    output.table(done.summary(), ["matrix", "tensor", "survived", "cosine"], rows)
    if len(edited) > SHOWN:
        output.text(f"  and {len(edited) - SHOWN} more, all in {done.path}/steer/manifest.yaml")
    for each in done.manifest.forced[:SHOWN]:
        output.text(f"  not what the patch was made for: {each.matrix} ({each.found[:19]}… for {each.expected[:19]}…)")
