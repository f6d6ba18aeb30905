"""`steer serve`: vLLM's own server, with a folder of steerings that requests choose from by name."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.options import Json, Model, Quiet, Seed
from steer.cli.output import Output
from steer.errors import SteerError

Folder = Annotated[
    Path | None,
    typer.Option(
        "--steerings", show_default=False, help="A folder of NAME.yaml and of LoRA adapters; looked at all the time."
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings", show_default=False, help="Default, limits, keys and switch, as YAML; read again when it changes."
    ),
]
DefaultText = Annotated[
    str | None,
    typer.Option("--default", show_default=False, help="NAME[@COEFFICIENT] for requests that name no steering."),
]
Limits = Annotated[
    tuple[float, float] | None,
    typer.Option("--coefficients", show_default=False, help="The least and the most that a request may ask for."),
]
Off = Annotated[bool, typer.Option("--off", help="Steer nothing; every reply says so.")]
Declare = Annotated[
    list[str] | None,
    typer.Option(
        "--declare",
        show_default="what the folder needs at start",
        help="all, or SITE[:LAYERS] such as resid_post:0-5, for files that come later; may be repeated.",
    ),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store", show_default="in the user's cache", help="A folder that every machine of the engine reads."
    ),
]
Name = Annotated[str | None, typer.Option("--name", show_default="MODEL", help="What requests call the model.")]
Host = Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 for every network.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]
AtOnce = Annotated[int, typer.Option("--max-num-seqs", min=1, help="Requests that run at once, each with a slot.")]
Drain = Annotated[int, typer.Option("--drain", min=0, help="Seconds for running requests after SIGTERM.")]
Degree = Annotated[int, typer.Option(min=1, help="As vLLM has it.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the command; start nothing.")]
Rest = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- ARGUMENTS]", show_default=False, help="Arguments of `vllm serve`, handed on as they are."
    ),
]


def command(
    model: Model,
    rest: Rest = None,
    steerings: Folder = None,
    settings: SettingsFile = None,
    default: DefaultText = None,
    coefficients: Limits = None,
    off: Off = False,
    declare: Declare = None,
    store: StoreFolder = None,
    name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_num_seqs: AtOnce = 256,
    drain: Drain = 30,
    tensor_parallel: Degree = 1,
    pipeline_parallel: Degree = 1,
    data_parallel: Degree = 1,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
) -> None:
    """Serve MODEL with vLLM's OpenAI-compatible server; a request names a steering, a coefficient and a phase."""
    from steer.backends.vllm.server.run import Options, plan
    from steer.backends.vllm.start import require

    output = Output(json, quiet)
    if not dry_run:
        require()
        _check_free(host, port)
    options = Options(
        model,
        steerings=steerings,
        settings=settings,
        flags=_flags(default, coefficients, off),
        store=store,
        name=name,
        declare=tuple(declare or ()),
        host=host,
        port=port,
        max_num_seqs=max_num_seqs,
        drain=drain,
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        data=data_parallel,
        seed=seed,
        rest=tuple(rest or ()),
    )
    planned = plan(options)
    listed = planned.front.listing(None)
    rows = [[row["name"], row["fingerprint"] or "", row["problem"] or "served"] for row in listed["steerings"]]
    output.table(f"Steerings of {planned.started.name}", ["name", "fingerprint", ""], rows)
    if dry_run:
        output.text(shlex.join(planned.command))
    output.result({"command": list(planned.command), **listed})
    if not dry_run:
        output.remark(f"Listening at http://{host}:{port} when vLLM is ready …")
        planned.become()


def _check_free(host: str, port: int) -> None:
    """Refuse an address at which nothing can listen; vLLM would find out behind minutes, with a traceback."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SteerError(
            f"nothing can listen at {host}:{port} ({error.strerror})",
            "an address of this machine, and a port that is free",
            "Choose another with --port",
        ) from None


def _flags(default: str | None, coefficients: tuple[float, float] | None, off: bool) -> dict[str, Any]:
    flags: dict[str, Any] = {"enabled": False} if off else {}
    if coefficients is not None:
        flags["coefficients"] = list(coefficients)
    if default is not None:
        name, at, number = default.rpartition("@")
        try:
            flags["default"] = {"steering": name, "coefficient": float(number)} if at else {"steering": default}
        except ValueError:
            raise SteerError(f"--default is {default!r}", "NAME or NAME@COEFFICIENT") from None
    return flags
