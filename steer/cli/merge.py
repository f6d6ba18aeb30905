"""`steer merge`: merge models by a recipe of mergekit's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edits.merge.plan import MergePlan, plan
from edits.merge.recipe import read_recipe
from steer.cli.options import Json, Quiet, Resume, Seed
from steer.cli.output import Output
from steer.errors import SteerError


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A .yaml of mergekit's format, or a bundled one: ada_r1.", show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The new folder.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=MODEL",
            help="Put a model in the place of a name in the recipe.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force", metavar="CHECK", help="Pass over a check that says stop, knowingly.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done; reads headers and samples.")
    ] = False,
    resume: Resume = False,
    link: Annotated[bool, typer.Option("--link", help="Share files that stay with the base by hard links.")] = False,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: linear, task_arithmetic, ties, dare_linear, dare_ties, slerp. Arithmetic in float64, bounded memory.

    Files, shards and configuration are those of the recipe's base_model, or of its first model.
    """
    output = Output(json, quiet)
    made = plan(read_recipe(recipe, dict(map(_named, model or [])), seed), force=force or ())
    if seed not in (0, made.recipe.seed):
        raise SteerError(
            f"--seed {seed} was given, and {recipe} has seed {made.recipe.seed}", "one seed", "Take one of them out"
        )
    report = _report(made)
    if dry_run:
        output.text(str(made))
        output.result(report | {"checkpoint": None})
        return
    if out is None:
        raise SteerError("no output was named", "--out FOLDER", "Or see what would be done with --dry-run")
    with output.progress("merging", made.bytes_to_write) as bar:
        done = made.merge(out, resume=resume, link=link, progress=bar.add)
    for line in done.summary():
        output.text(line)
    output.result(report | {"checkpoint": str(done.path), "survived": done.survived, "notes": done.manifest.notes})


def _report(made: MergePlan) -> dict[str, Any]:
    return {
        "recipe": made.recipe.source,
        "tensors": made.counts,
        "bytes_read": made.bytes_read,
        "bytes_to_write": made.bytes_to_write,
        "memory": made.memory,
        "compatibility": made.compatibility.to_dict(),
        "notes": list(made.notes),
    }


def _named(text: str) -> tuple[str, str]:
    name, found, model = text.partition("=")
    if not (name and found and model):
        raise SteerError(f"--model {text!r} names no model", "NAME=MODEL, where NAME stands in the recipe")
    return name, model
