"""How vLLM's own server is started: its program, its arguments, and one variable of the environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer.adapters import CONFIG
from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import Place, places_of
from steer.backends.vllm.server import places
from steer.backends.vllm.server.directory import Directory
from steer.backends.vllm.server.front import VARIABLE, Front, Started
from steer.backends.vllm.server.settings import Settings
from steer.backends.vllm.widened import NARROWEST, head_width, widen
from steer.errors import SteerError
from steer.loading import tokenizer_of
from steer.marks import Marks
from steer.sources import Source, locate
from steer.steering import Steering
from steer.weights import cache_folder, weights_id

PROGRAM = "steer.backends.vllm.server.launch"
MIDDLEWARE = "steer.backends.vllm.server.middleware.SteeringMiddleware"
OURS = {
    "--additional-config": "It carries what may be steered",
    "--served-model-name": "Use --name, before the --",
    "--max-num-seqs": "Use --max-num-seqs, before the --: slots follow from it",
    "--shutdown-timeout": "Use --drain, before the --",
    "--lora-modules": "Put the adapter's folder into the folder of steerings",
    "--api-key": "Keys come from the environment: keys in the settings, or VLLM_API_KEY",
    "--grpc": "Requests over gRPC would pass by the steerings",
    "--grpc-port": "Requests over gRPC would pass by the steerings",
}
"""Arguments of vLLM that are not handed on, and what to do instead."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM makes room for."""
MOST_ADAPTERS = 8
"""Adapters of one batch; more of them take turns."""


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
        if find_spec("vllm") is None:
            raise SteerError("vLLM is not installed", "vllm>=0.30,<0.34", "pip install 'reasoning-steer[vllm]'")
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
    store = options.store or cache_folder() / "vllm-store"
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
    return Plan(tuple(_arguments(options, started, source)), started, front)


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


def _arguments(options: Options, started: Started, source: Source) -> list[str]:
    parallel = {
        "--tensor-parallel-size": options.tensor,
        "--pipeline-parallel-size": options.pipeline,
        "--data-parallel-size": options.data,
    }
    return [
        "serve",
        str(runnable(source)),
        *("--served-model-name", started.name),
        *("--host", options.host, "--port", str(options.port)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        *("--shutdown-timeout", str(options.drain)),
        *(word for flag, degree in parallel.items() if degree > 1 for word in (flag, str(degree))),
        *_adapters(started),
        *options.rest,
        *("--additional-config", json.dumps(started.config, separators=(",", ":"))),
        *("--middleware", MIDDLEWARE),
    ]


def _adapters(started: Started) -> list[str]:
    if not started.adapters:
        return []
    folders = {name: Path(str(started.steerings)) / name for name in started.adapters}
    highest = max(_rank(folder) for folder in folders.values())
    room = [rank for rank in RANKS if rank >= highest]
    if not room:
        raise SteerError(f"an adapter has rank {highest}", f"at most {RANKS[-1]}, which vLLM has room for")
    together = min(len(folders), MOST_ADAPTERS)
    return [
        "--enable-lora",
        *("--max-lora-rank", str(room[0]), "--max-loras", str(together), "--max-cpu-loras", str(len(folders))),
        "--lora-modules",
        *(json.dumps({"name": name, "path": str(folder)}) for name, folder in folders.items()),
    ]


def _rank(folder: Path) -> int:
    """The highest rank of an adapter, by its configuration."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return max(int(config["r"]), *map(int, config.get("rank_pattern", {}).values()), 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteerError(f"{folder / CONFIG} says no rank ({error})", "an adapter as PEFT writes it") from None


def runnable(source: Source) -> Path:
    """Return the folder that vLLM is given: an organism's with wider heads, which it needs, else the model's own."""
    if not source.organism or head_width(source.folder) >= NARROWEST:
        return source.folder
    identity = weights_id(source.folder, read_headers(source.folder).files)
    folder = cache_folder() / "vllm" / f"{source.folder.name}-{identity[:16]}-{head_width(source.folder)}"
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        widen(source.folder, beside).rename(folder)
    return folder


def _tokenizer(source: Source) -> Any:
    try:
        return tokenizer_of(source.folder)
    except SteerError:  # It has none; then there are no marks and no chat.
        return None


def _check_rest(rest: Sequence[str]) -> None:
    for word in rest:
        flag = word.split("=")[0].replace("_", "-")
        if flag in OURS:
            raise SteerError(f"{flag} stands among the arguments for vLLM", "arguments that steer serve leaves alone", OURS[flag])  # fmt: skip
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SteerError("VLLM_USE_RUST_FRONTEND is set", "vLLM's server in Python", "Unset it: that front end has no middleware")  # fmt: skip


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
