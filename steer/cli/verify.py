"""`steer verify`: measure whether two subjects are the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edits.checkpoint.compare import OnDisk
from edits.verify import Subject as Side
from edits.verify import verify
from steer.cli.options import Json, Quiet, Seed, Subject
from steer.cli.output import Output
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.patches import Patch
from steer.promptfile import read_prompts
from steer.prompts import Content
from steer.sources import locate
from steer.subjects import load_change, open_subject, parse


def command(
    first: Subject,
    second: Subject,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare tensors on disk only; no model is loaded.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="More prompts: one per line, or .jsonl as for generate.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest logit difference that passes.", show_default="3 x floor"),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure whether two subjects are the same model: bytes, then logits. Exits with 1 if they are not."""
    output = Output(json, quiet)
    sides: list[Side] = [_on_disk(first), _on_disk(second)] if weights else [open_subject(first), open_subject(second)]
    more = _questions(sides[0]) if prompts is None else [prompt.content for prompt in read_prompts(prompts)]
    found = verify(sides[0], sides[1], more, weights_only=weights, tolerance=tolerance)
    output.text(str(found))
    output.result(found.to_dict())
    return 0 if found.passed else 1


def _questions(side: Side) -> list[Content]:
    """Return some of the organism's own questions; none for other models."""
    card = side.card if isinstance(side, SteerableModel) else None
    if card is None or "task" not in card:
        return []
    from experiments.tasks import named

    return [item.content(chat=True) for item in named(str(card["task"])).items(8)]


def _on_disk(text: str) -> OnDisk:
    """Read a subject without loading its model."""
    subject = parse(text)
    if subject.backend != "hf":
        raise SteerError(f"{text!r} asks for vLLM", "a subject without vllm:", "Its weights are the checkpoint's own")
    changes = [(load_change(path), scale) for path, scale in subject.changes]
    patches = [(each if isinstance(each, Patch) else Patch.from_steering(each), scale) for each, scale in changes]
    return OnDisk(locate(subject.model).folder, tuple(patches))
