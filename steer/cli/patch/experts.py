"""`steer patch experts`: turn chosen experts of a mixture up, down or off, in weights or as a steering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edits.checkpoint.apply import pin
from edits.checkpoint.plan import plan
from edits.experts import check_beta, expert_patch
from steer.cli.options import Json, Model, Quiet, Seed
from steer.cli.output import Output
from steer.coverage import coverage
from steer.errors import SteerError
from steer.expert_interventions import Expert, ScaleExperts
from steer.expert_scores import ExpertScores
from steer.files import refuse_existing
from steer.head_lists import read_heads
from steer.identity import ModelIdentity, check_same
from steer.sources import locate
from steer.steering import Steering
from steer.targets import target_of


def command(
    model: Model,
    beta: Annotated[
        float, typer.Option("--beta", help="What the experts write is multiplied by; 64 in RICE, 0 takes them out.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The patch to write; must not exist yet.")] = None,
    steering: Annotated[
        Path | None, typer.Option("--steering", help="The same as a steering, name.yaml: alone, or beside --out.")
    ] = None,
    scores: Annotated[Path | None, typer.Option("--scores", help="From `steer probe experts`; for --top.")] = None,
    top: Annotated[int | None, typer.Option("--top", help="Take the N experts with the largest scores.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="LAYER:EXPERT",
            help="An expert, a list such as '[(3, 0), (2, 5)]' or its file; may be repeated.",
        ),
    ] = None,
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Keep the sum of a token's weights; a steering alone says it.")
    ] = False,
    phase: Annotated[
        str, typer.Option("--phase", help="When, such as thinking; all but `all` a steering alone says.")
    ] = "all",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Scale what chosen experts write (RICE): as a patch of weights, as a steering, or both; changes no model."""
    _check_outputs(out, steering, renormalise, phase)
    check_beta(beta)
    output = Output(json, quiet)
    found = None if scores is None else ExpertScores.load(scores)
    chosen = _chosen(found, top, expert or [])
    change = ScaleExperts(chosen, beta, renormalise, phase)
    hook = Steering((change,), _identity(found, model))
    covered = coverage(hook, model, "hook")
    told: dict[str, Any] = {"experts": [list(pair) for pair in change.experts], "beta": change.beta}
    lines: list[str] = []
    if out is not None:
        made = plan(expert_patch(chosen, beta, model, scores=found), locate(model).folder)
        patch = pin(made)
        patch.save(out)
        told |= {"patch": str(out), "fingerprint": patch.fingerprint, "coverage": made.coverage}
        lines += [f"{out}: {patch}", made.coverage, f"Apply it with `steer apply {model} {out} --out FOLDER`"]
    if steering is not None:
        hook.save(steering)
        told |= {"steering": str(steering), "steering_fingerprint": hook.fingerprint, "hook": covered.to_dict()}
        lines += [f"{steering}: {hook}", str(covered), f"Use it as `{model}+{steering}`, such as in `steer evaluate`"]
    ties = found.ties(top) if found is not None and top is not None else ()
    if ties:
        told["ties"] = [list(pair) for pair in ties]
        lines.append(f"{len(ties)} other experts have the score of the last one that was taken, such as {ties[0]}")
    output.text("\n".join(lines))
    output.result(told)


def _check_outputs(out: Path | None, steering: Path | None, renormalise: bool, phase: str) -> None:
    if out is None and steering is None:
        raise SteerError(
            "neither --out nor --steering was given", "what to write: a patch, a steering or both", "Add --out FILE"
        )
    wanted = [*(["--renormalise"] if renormalise else []), *([f"--phase {phase}"] if phase != "all" else [])]
    if out is not None and wanted:
        raise SteerError(
            f"a patch was asked for with {' and '.join(wanted)}",
            "neither, since weights multiply by one number, for every token alike",
            "Leave --out out and give --steering FILE.yaml alone, which is the hook form",
        )
    for path in filter(None, (out, steering)):
        refuse_existing(path, overwrite=False)


def _identity(scores: ExpertScores | None, model: str) -> ModelIdentity:
    """The model as the scores know it, where they do, since they may know its weights too."""
    here = target_of(model).identity
    if scores is None or scores.model is None:
        return here
    check_same(scores.model, here, "the expert scores")
    return scores.model


def _chosen(scores: ExpertScores | None, top: int | None, named: list[str]) -> tuple[Expert, ...]:
    if (top is None) == (not named):
        raise SteerError(
            f"{'both' if named else 'neither'} of --top and --expert were given",
            "exactly one way to choose experts",
            "For example --scores experts.safetensors --top 2, or --expert 3:0 --expert 2:5",
        )
    if named and scores is not None:
        raise SteerError("--scores was given beside --expert", "scores for --top alone", "Leave --scores out")
    if named:
        return tuple(dict.fromkeys(pair for text in named for pair in read_heads(text, "expert")))
    if scores is None or top is None:
        raise SteerError(
            "experts are to be chosen by their scores and no scores were given",
            "--scores FILE",
            "Make them with `steer probe experts`",
        )
    return scores.top(top)
