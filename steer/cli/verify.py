"""`steer verify`: measure whether two subjects are the same model, or prove an edit from its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edits.checkpoint.compare import OnDisk, on_disk
from edits.checkpoint.manifest import MANIFEST, PATCH, STORY
from edits.checkpoint.proof import prove
from edits.served import verify_served
from edits.verify import TOKENS, verify
from steer.cli.engine import Engine, engine_options
from steer.cli.options import Json, Quiet, Runnable, Seed
from steer.cli.output import Output
from steer.errors import SteerError
from steer.promptfile import read_prompts
from steer.prompts import Content
from steer.sources import locate
from steer.subjects import open_subject, parse

Weights = Annotated[
    bool,
    typer.Option(
        "--weights",
        help="Compare tensors on disk only; no model is loaded. A base and what `apply` made of it: prove the edit.",
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="With --weights, of an edit: know by size alone what the patch leaves as it is.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="Prompts to reply to: one per line, or .jsonl as for generate; a few built-in ones if not given.",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=0, help="Length of the greedy replies; 0: write none.")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="Largest logit difference that passes.", show_default="3 x floor"),
]


def command(
    first: Runnable,
    second: Runnable,
    weights: Weights = False,
    quick: Quick = False,
    prompts: Prompts = None,
    tokens: Tokens = TOKENS,
    tolerance: Tolerance = None,
    engine: Engine = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure whether two subjects are the same model: bytes, then logits. Exits with 1 if they are not."""
    output = Output(json, quiet)
    if "vllm" not in (parse(first).backend, parse(second).backend) or weights:
        engine_options(engine, False)
    if weights and (prompts is not None or tolerance is not None or tokens != TOKENS):
        raise SteerError(
            "--weights compares bytes and runs nothing, so --prompts, --tokens and --tolerance would do nothing",
            "--weights alone, or without it",
            "Leave one of them out",
        )
    if weights:
        sides = on_disk(first), on_disk(second)
        if _is_edit(*sides):
            return _prove(*sides, read=not quick, output=output)
        if quick:
            raise SteerError(
                "--quick is for a base and the checkpoint that `steer apply` made of it",
                f"a second folder with {MANIFEST}, and no patch on either side",
                "Leave --quick out",
            )
        found = verify(*sides, weights_only=True)
    elif quick:
        raise SteerError("--quick was given without --weights", "both, or none")
    elif "vllm" in (parse(first).backend, parse(second).backend):
        options = engine_options(engine, True)
        return _served(first, second, prompts, tolerance, tokens, output, options)
    else:
        a, b = open_subject(first), open_subject(second)
        more = _questions(a.card) if prompts is None else [prompt.content for prompt in read_prompts(prompts)]
        found = verify(a, b, more, tolerance=tolerance, tokens=tokens)
    output.text(str(found))
    output.result(found.to_dict())
    return 0 if found.passed else 1


def _is_edit(base: OnDisk, edited: OnDisk) -> bool:
    """Whether the question is what became of a base, not whether two checkpoints are the same."""
    found = [_applied(side.folder) for side in (base, edited)]
    return not base.patches and not edited.patches and found[1] is not None and found[0] != found[1]


def _applied(folder: Path) -> bytes | None:
    """Return the manifest of a folder that `apply` wrote; None for others, such as a merge."""
    known = any((folder / name).is_file() for name in (PATCH, STORY)) and (folder / MANIFEST).is_file()
    return (folder / MANIFEST).read_bytes() if known else None


def _prove(base: OnDisk, edited: OnDisk, *, read: bool, output: Output) -> int:
    with output.progress("tensors checked") as bar:
        found = prove(edited.folder, base.folder, read=read, progress=lambda done, total: bar.to(done, total))
    output.text(str(found))
    output.result(found.to_dict())
    return 0 if found.passed else 1


def _served(
    first: str,
    second: str,
    prompts: Path | None,
    tolerance: float | None,
    tokens: int,
    output: Output,
    options: dict[str, Any],
) -> int:
    """Compare an engine of vLLM with a model, whichever comes first."""
    served, other = (first, second) if parse(first).backend == "vllm" else (second, first)
    own = locate(parse(served).model).card or locate(parse(other).model).card
    more = _questions(own) if prompts is None else [prompt.content for prompt in read_prompts(prompts)]
    found = verify_served(served, other, more, tolerance=tolerance, tokens=tokens, options=options)
    output.text(str(found))
    output.result(found.to_dict())
    return 0 if found.passed else 1


def _questions(card: dict[str, Any] | None) -> list[Content] | None:
    """Return some of the organism's own questions; None, the built-in ones, for other models."""
    if card is None or "task" not in card:
        return None
    from experiments.tasks import named

    return [item.content(chat=True) for item in named(str(card["task"])).items(8)]
