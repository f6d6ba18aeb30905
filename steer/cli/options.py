"""Options and arguments that mean the same in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides everything that is random.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A hub id, a folder, a file.gguf, or organism:chain (bundled)."
    ),
]
Subject = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        show_default=False,
        help="MODEL[+FILE[@COEFFICIENT]]…: a model and the changes that it runs with.",
    ),
]
Runnable = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        show_default=False,
        help="[vllm:]MODEL[+FILE[@COEFFICIENT]]…: a model and the changes that it runs with; with vllm: in vLLM.",
    ),
]
Out = Annotated[Path, typer.Option("--out", show_default=False, help="What to write; must not exist yet.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped; gives the same bytes.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; as stored if not given.", show_default=False),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the best there is if not given.")]
Rows = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Sequences that run together.", show_default="64; of vLLM 256, on processors 32"
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences that run together.")]
