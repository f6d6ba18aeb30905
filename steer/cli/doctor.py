"""`steer doctor`: what is here, and whether steering works with it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from steer.cli.options import Json, Quiet, Seed
from steer.cli.output import Output
from steer.errors import SteerError

CORE = ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "huggingface_hub", "numpy", "scikit-learn")
EXTRAS = {
    "eval": ("math-verify", "reasoning-gym", "lm-eval"),
    "gguf": ("gguf",),
    "lens": ("transformer-lens",),
    "notebook": ("pandas",),
    "train": ("trl", "peft", "datasets"),
    "vllm": ("vllm",),
    "zst": ("zstandard",),
}
BACK_ENDS = {
    "hook": ("torch", "run and measure changes in this process"),
    "patch": ("safetensors", "write changes into checkpoints"),
    "transformer-lens": ("transformer_lens", "read by another library, for comparison"),
    "vllm": ("vllm", "generate fast"),
}
MODEL = "organism:chain"


Server = Annotated[
    str | None, typer.Option("--server", show_default=False, help="Ask a running `steer serve` instead, by its URL.")
]
Name = Annotated[
    str | None, typer.Option("--steering", show_default="the first that is served", help="Which one, with --server.")
]
KeyVariable = Annotated[
    str,
    typer.Option("--key-env", help="The variable of the environment that holds the server's key, where it has one."),
]


def command(
    server: Server = None,
    steering: Name = None,
    key_env: KeyVariable = "VLLM_API_KEY",
    json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
) -> None:
    """Say which versions, devices and back ends are here, and steer the bundled model to see that it works.

    Exit status 1 if the steered model is not exactly what it should be.
    """
    out = Output(json, quiet)
    if server is not None:
        _ask(out, server, steering, key_env)
        return
    if steering is not None:
        raise SteerError("--steering was given without --server", "the server that has it", "Add --server URL")
    packages = {name: installed(name) for name in CORE}
    extras = {extra: {name: installed(name) for name in names} for extra, names in EXTRAS.items()}
    ready = {name: find_spec(module) is not None for name, (module, _) in BACK_ENDS.items()}
    here = devices()
    out.table("", ["package", "version"], [["python", platform.python_version()], *packages.items()])
    rows = [[extra, name, found or "not installed"] for extra, names in extras.items() for name, found in names.items()]
    out.table("\nExtras (pip install 'reasoning-steer[EXTRA]')", ["extra", "package", "version"], rows)
    out.table("\nDevices", ["device", "what"], [[row["device"], row["what"]] for row in here])
    use = [[name, "ready" if ready[name] else "not installed", why] for name, (_, why) in BACK_ENDS.items()]
    out.table("\nBack ends", ["back end", "", "use"], use)
    out.remark(f"\nSteering {MODEL} …")
    from steer.canary import sing
    from steer.model import load

    canary = sing(load(MODEL), seed)
    verdict = (
        "works" if canary.passed else "DOES NOT WORK here; please report this with the output of `steer doctor --json`"
    )
    out.text(
        f"\nSteering {verdict}: logits moved by {canary.change:.3g}, off by {canary.error:.2g} from the same change"
        f" without hooks; {canary.positions} positions touched; coefficient 0"
        f" {'changed nothing' if canary.zero_is_plain else 'CHANGED SOMETHING'}; {canary.left_behind} hooks left behind."
    )
    out.result(
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": packages,
            "extras": extras,
            "devices": here,
            "back_ends": ready,
            "canary": {"model": MODEL, **asdict(canary), "passed": canary.passed},
        }
    )
    if not canary.passed:
        raise typer.Exit(1)


def _ask(out: Output, url: str, steering: str | None, variable: str) -> None:
    """Steer at a running server, and say whether it did."""
    from steer.backends.vllm.server.canary import sing

    canary = sing(url, os.environ.get(variable), steering)
    verdict = "works" if canary.passed else "DOES NOT WORK"
    out.text(
        f"Steering {verdict} at {canary.url}: {canary.steering!r} at {canary.coefficient:g} moved log-probabilities of"
        f" {canary.model} by {canary.change:.3g} ({'another' if canary.tokens_differ else 'the same'} greedy reply);"
        f" two plain replies differ by {canary.noise:.2g}; the replies said"
        f" {'correctly' if canary.said else 'WRONGLY'} what they were steered by."
    )
    out.result({"server": {**asdict(canary), "passed": canary.passed}})
    if not canary.passed:
        raise typer.Exit(1)


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Return what torch can compute on: name, description, bytes of memory where it is known."""
    import torch

    threads = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found: list[dict[str, Any]] = [{"device": "cpu", "what": threads, "bytes": None}]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        what = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
        found.append({"device": f"cuda:{index}", "what": what, "bytes": card.total_memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "what": "Apple GPU", "bytes": None})
    return found
