"""How vLLM's own server is started: its program, its arguments, and one variable of the environment."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.backends.vllm.adapters import Adapter, rank_of
from steer.backends.vllm.adapters import options as room
from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import Place, places_of
from steer.backends.vllm.server import places
from steer.backends.vllm.server.directory import Directory
from steer.backends.vllm.server.front import VARIABLE, Front, Started
from steer.backends.vllm.server.settings import Settings
from steer.backends.vllm.start import mark_texts, require, runnable, stored
from steer.backends.vllm.store import usual
from steer.errors import SteerError
from steer.loading import tokenizer_of
from steer.marks import Marks
from steer.sources import Source, locate
from steer.steering import Steering

PROGRAM = "steer.backends.vllm.server.launch"
MIDDLEWARE = "steer.backends.vllm.server.middleware.SteeringMiddleware"
OURS = {
    "--additional-config": "It carries what may be steered",
    "--config": "Its file could say any of these. Give the arguments themselves",
    "--host": "Use --host, before the --",
    "--port": "Use --port, before the --",
    "--seed": "Use --seed, before the --",
    "--served-model-name": "Use --name, before the --",
    "--max-num-seqs": "Use --max-num-seqs, before the --: slots follow from it",
    "--shutdown-timeout": "Use --drain, before the --",
    "--lora-modules": "Put the adapter's folder into the folder of steerings",
    "--api-key": "Keys come from the environment: keys in the settings, or VLLM_API_KEY",
    "--grpc": "Requests over gRPC would pass by the steerings",
    "--grpc-port": "Requests over gRPC would pass by the steerings",
}
"""Arguments of vLLM that are not handed on, and what to do instead."""


@dataclass(frozen=True)
class Options:
    """What `steer serve` was told.

    Attributes:
        model: a hub id, a folder, or organism:NAME.
        steerings: folder of steerings; None: none are offered.
        settings: file of settings; None: none.
        flags: settings that were given as flags.
        store: folder of the store; None: one in the user's cache.
        name: of the model, as requests call it; None: `model`.
        declare: see `places.declared`.
        host, port: where to listen.
        max_num_seqs: requests that run at once, and slots.
        drain: seconds that running requests are given when the server is told to end.
        tensor, pipeline, data: degrees of parallelism.
        seed: of vLLM.
        rest: further arguments of vLLM.
    """

    model: str
    steerings: Path | None = None
    settings: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    store: Path | None = None
    name: str | None = None
    declare: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    max_num_seqs: int = 256
    drain: int = 30
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    seed: int = 0
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What would be started.

    Attributes:
        arguments: behind the name of vLLM's program.
        started: what its API servers are told.
        front: as each of them will have it.
    """

    arguments: tuple[str, ...]
    started: Started
    front: Front

    @property
    def command(self) -> tuple[str, ...]:
        """What is run."""
        return (sys.executable, "-m", PROGRAM, *self.arguments)

    def become(self) -> None:
        """Turn this process into vLLM's server; returns only where that fails.

        Raises:
            SteerError: vLLM is not installed.
        """
        require()
        os.execve(self.command[0], self.command, {**os.environ, VARIABLE: self.started.to_text()})


def plan(options: Options) -> Plan:
    """Check everything that can be checked without vLLM, and say how it is to be started.

    Raises:
        SteerError: no such model, folder or file; a setting, a key or an argument that cannot be; a default that cannot
            be served.
        OSError: the store cannot be made.
    """
    _check_rest(options.rest)
    source = locate(options.model)
    headers = read_headers(source.folder)
    anatomy = resolve(headers.config, shapes_of(headers.config, headers.shapes))
    store = options.store or usual()
    store.mkdir(parents=True, exist_ok=True)
    directory = Directory(None if options.steerings is None else options.steerings)
    most = Started("", "", {}, settings=_text(options.settings), flags=options.flags).read_settings().file_bytes
    entries = directory.entries(most)
    tokenizer = _tokenizer(source)
    declared = Declared.of(
        anatomy,
        store,
        slots=options.max_num_seqs,
        places=[
            *places.declared(options.declare, anatomy),
            *_needed([entry.steering for entry in entries if entry.steering is not None], anatomy),
        ],
        marks=None if tokenizer is None else Marks.from_tokenizer(tokenizer),
        endings=places.endings(tokenizer),
    )
    started = Started(
        options.name or options.model,
        str(source.folder),
        declared.to_config(),
        None if directory.folder is None else str(directory.folder),
        _text(options.settings),
        options.flags,
        {entry.name: entry.fingerprint for entry in entries if entry.adapter and not entry.problem},
    )
    front = Front(started)
    _check_default(front)
    return Plan(tuple(_arguments(options, front, source, tokenizer)), started, front)


def _needed(steerings: Sequence[Steering], anatomy: Anatomy) -> list[Place]:
    """Places of what fits this model; the rest is listed with the reason, and asking for it is refused."""
    found: list[Place] = []
    for steering in steerings:
        try:
            steering.check(anatomy)
            found += places_of(steering)
        except SteerError:  # `Front` says it for each name, when it is listed or asked for.
            continue
    return found


def _check_default(front: Front) -> None:
    """Refuse to start a server that could serve nobody."""
    settings: Settings = front.settings()
    if settings.enabled and settings.default is not None:
        front.admit({}, None, "raw")


def _arguments(options: Options, front: Front, source: Source, tokenizer: Any) -> list[str]:
    started, processors = front.started, not torch.accelerator.is_available()
    folder = runnable(source, processors)
    parallel = {
        "--tensor-parallel-size": options.tensor,
        "--pipeline-parallel-size": options.pipeline,
        "--data-parallel-size": options.data,
    }
    return [
        "serve",
        str(folder),
        *("--served-model-name", started.name),
        *("--host", options.host, "--port", str(options.port)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        *("--shutdown-timeout", str(options.drain), "--seed", str(options.seed)),
        *(word for flag, degree in parallel.items() if degree > 1 for word in (flag, str(degree))),
        *_adapters(started, folder == source.folder, processors, front.declared.experts),
        *_reasoning(options, front, tokenizer),
        *_dtype(options, folder),
        *options.rest,
        *("--additional-config", json.dumps(started.config, separators=(",", ":"))),
        *("--middleware", MIDDLEWARE),
    ]


def _adapters(started: Started, own: bool, processors: bool, experts: int) -> list[str]:
    folders = {name: Path(str(started.steerings)) / name for name in started.adapters}
    if not folders:
        return []
    if not own:
        raise SteerError(
            f"the adapter {min(folders)!r} was made for heads of another width than vLLM runs this model with",
            "no adapters beside an organism on processors",
            "Serve the folder with wider heads itself, and an adapter that was exported for it",
        )
    held = [Adapter(name, folder, rank_of(folder), 0, "") for name, folder in folders.items()]
    rows = (json.dumps({"name": name, "path": str(folder)}) for name, folder in folders.items())
    flags = [(flag, value) for flag, value in room(held, processors, experts).items() if value is not True]
    told = [word for flag, value in flags for word in (f"--{flag.replace('_', '-')}", str(value))]
    return ["--enable-lora", *told, "--lora-modules", *rows]


def _reasoning(options: Options, front: Front, tokenizer: Any) -> list[str]:
    """Name the marks for `thinking_token_budget`, where vLLM's can be the same and nothing else was said."""
    if tokenizer is None or any(word.replace("_", "-").startswith("--reasoning") for word in options.rest):
        return []
    texts = mark_texts(front.declared.marks, tokenizer)
    told = {} if texts is None else {"reasoning_start_str": texts[0], "reasoning_end_str": texts[1]}
    return ["--reasoning-config", json.dumps(told)] if told else []


def _dtype(options: Options, folder: Path) -> list[str]:
    """Keep weights of float32 as they are, as `SteeredLLM` does, where nothing else was said; vLLM would halve them."""
    said = any(word.split("=")[0] == "--dtype" for word in options.rest)
    return ["--dtype", "float32"] if stored(folder) == "float32" and not said else []


def _tokenizer(source: Source) -> Any:
    try:
        return tokenizer_of(source.folder)
    except SteerError:  # It has none; then there are no marks and no chat.
        return None


def _check_rest(rest: Sequence[str]) -> None:
    for word in rest:
        flag = re.split("[=.]", word)[0].replace("_", "-")  # --additional-config.KEY=VALUE is one of vLLM's ways, too.
        ours = flag if flag in OURS else _shortened(flag)
        if ours is not None:
            raise SteerError(f"{ours} stands among the arguments for vLLM", "arguments that steer serve leaves alone", OURS[ours])  # fmt: skip
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SteerError("VLLM_USE_RUST_FRONTEND is set", "vLLM's server in Python", "Unset it: that front end has no middleware")  # fmt: skip


def _shortened(flag: str) -> str | None:
    """Return the flag of ours that vLLM's parser may take a beginning of it for; --config is one of other flags."""
    fitting = (ours for ours in OURS if ours != "--config" and len(flag) > 2 and ours.startswith(flag))
    return next(fitting, None) if flag.startswith("--") else None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
