"""`steer demo`: the whole loop on the bundled organism, or on its mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.options import Json, Quiet, Seed
from steer.cli.output import Output

if TYPE_CHECKING:
    from experiments.demo_experts_result import ExpertDemoResult
    from experiments.demo_result import DemoResult

Folder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        show_default="demo, or demo-moe",
        help="A new folder. Without --out an earlier demo in demo/ (demo-moe/) is replaced.",
    ),
]
Moe = Annotated[bool, typer.Option("--moe", help="On the mixture of experts: find, scale and edit experts.")]


def command(out: Folder = None, moe: Moe = False, seed: Seed = 0, json: Json = False, quiet: Quiet = False) -> None:
    """Evaluate, steer, edit, verify and report on the bundled organism: a minute and a half without a GPU or a download."""
    from experiments.bench import clear_own

    output = Output(json, quiet)
    folder = Path("demo-moe" if moe else "demo") if out is None else out
    if out is None:
        clear_own(folder)
    with output.progress("demo") as bar:
        result = _run(
            moe, folder, seed, lambda label, done, total, note: bar.to(done, total, f"{label} {note}".strip())
        )
    for line in result.sentences():
        output.text(f"{line}\n")
    output.text(f"Report: {result.report}\nCheckpoint: {result.checkpoint}\n{result.seconds:.0f} seconds")
    output.result(result.to_dict())


def _run(
    moe: bool, folder: Path, seed: int, tell: Callable[[str, int, int, str], None]
) -> DemoResult | ExpertDemoResult:
    if moe:
        from experiments.demo_experts import demo_experts

        return demo_experts(folder, seed, tell=tell)
    from experiments.demo import demo

    return demo(folder, seed, tell=tell)
