"""`--engine KEY=VALUE`: what vLLM's engine is told when a subject begins with vllm:."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
import yaml

from steer.errors import SteerError

Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="KEY=VALUE",
        show_default=False,
        help="With vllm: an option of vLLM's engine, such as tensor_parallel_size=8 or max_model_len=16384; repeat for several.",
    ),
]


def engine_options(given: Iterable[str] | None, runs: bool, own: Iterable[str] = ()) -> dict[str, Any]:
    """Read the options.

    Args:
        given: `KEY=VALUE`, the value as YAML; `-` and `_` are the same in a key.
        runs: whether the subject runs in vLLM.
        own: keys that the verb says itself.

    Raises:
        SteerError: an option of an engine where there is none, no `=`, a key twice, or one that is said elsewhere.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not runs:
            raise SteerError(f"--engine {text} was given, and the subject does not run in vLLM", "vllm: before it")
        if not equals or not key.isidentifier() or key in found:
            raise SteerError(f"--engine {text} was given", "KEY=VALUE, each key once")
        if key in ("model", "additional_config", *own):
            raise SteerError(
                f"--engine {text} was given", "an option that the verb does not say itself", f"Leave {key} to it"
            )
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SteerError(
                f"the value of --engine {text} cannot be read ({error})", "a number, a word, or YAML"
            ) from None
    return found
