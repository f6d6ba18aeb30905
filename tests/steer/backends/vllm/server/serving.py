"""A front and a middleware over a folder of steerings, with a vLLM that only repeats what it is asked."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import Anatomy, resolve
from steer.backends.vllm.config import Declared
from steer.backends.vllm.server.front import Front, Started
from steer.backends.vllm.server.middleware import SteeringMiddleware
from steer.directions import Direction
from steer.interventions import Add, Intervention, ScaleExperts
from steer.marks import Marks
from steer.sources import locate
from steer.steering import Steering

FOLDER = locate("organism:chain").folder
MARKS = Marks(((5,),), ((6,),))
CHAT = "/v1/chat/completions"


@cache
def anatomy() -> Anatomy:
    headers = read_headers(FOLDER)
    return resolve(headers.config, shapes_of(headers.config, headers.shapes))


def vector(seed: int = 0, layers: Sequence[int] = (1,), width: int | None = None) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(layers), width or anatomy().hidden, generator=generator)
    return Direction(values, tuple(layers), "resid_post")


def adding(seed: int = 0, layers: Sequence[int] = (1,), **given: Any) -> Steering:
    return Steering((Add(vector(seed, layers), "resid_post", **given),))


def only_scaling() -> Intervention:
    return ScaleExperts(((0, 0),), 0.0)


def adapter(folder: Path, rank: int = 4, content: bytes = b"weights") -> None:
    """Something that looks like an adapter; nothing here reads its weights."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(content)


def front(
    root: Path, steerings: Sequence[Steering] = (), adapters: dict[str, str] | None = None, **flags: Any
) -> Front:
    """A front over ROOT/steerings that was started for `steerings`; settings in ROOT/settings.yaml where it is there."""
    for name in ("steerings", "store"):
        (root / name).mkdir(exist_ok=True)
    declared = Declared.of(anatomy(), root / "store", steerings or (adding(),), slots=4, marks=MARKS)
    settings = root / "settings.yaml"
    started = Started(
        "chain", str(FOLDER), declared.to_config(), str(root / "steerings"),
        str(settings) if settings.exists() else None, flags, adapters or {},
    )  # fmt: skip
    return Front(started)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


@dataclass
class Engine:
    """Stands in for vLLM's app: remembers bodies, answers as it is told."""

    status: int = 200
    kind: bytes = b"application/json"
    parts: tuple[bytes, ...] = (b'{"id": 1, "x": 0.10', b"00}")
    paths: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        if scope["method"] == "POST":
            message = await receive()
            self.bodies.append(json.loads(message["body"]))
            lengths = [int(value) for name, value in scope["headers"] if name.lower() == b"content-length"]
            assert lengths == [len(message["body"])], "the length that was announced is that of the body"
        total = sum(len(part) for part in self.parts)
        headers = [(b"content-type", self.kind), (b"content-length", str(total).encode()), (b"x-other", b"kept")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for index, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": index + 1 < len(self.parts)})


@dataclass
class Client:
    """Calls a middleware as a server would."""

    front: Front
    engine: Engine = field(default_factory=Engine)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, body: Any = None, path: str = CHAT, method: str = "POST", **given: Any) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call(method, path, [data], **given)

    def get(self, path: str, **given: Any) -> Reply:
        return self.call("GET", path, [b""], **given)

    def steered(self, name: str | None = None, path: str = CHAT, key: str | None = None, **words: Any) -> Reply:
        arguments = {f"steering_{word}": value for word, value in words.items()}
        if name is not None:
            arguments["steering"] = name
        return self.ask({"model": "chain", "vllm_xargs": arguments}, path, key=key)

    def call(
        self, method: str, path: str, parts: Sequence[bytes], key: str | None = None, leaves: bool = False,
        length: int | None = None, root: str = "",
    ) -> Reply:  # fmt: skip
        headers = [(b"Content-Type", b"application/json")]
        headers += [(b"content-length", str(sum(map(len, parts)) if length is None else length).encode())]
        headers += [(b"authorization", f"Bearer {key}".encode())] if key is not None else []
        messages = [
            {"type": "http.request", "body": part, "more_body": leaves or index + 1 < len(parts)}
            for index, part in enumerate(parts)
        ]
        queue = iter([*messages, {"type": "http.disconnect"}])
        self.sent = []

        async def receive() -> dict[str, Any]:
            return next(queue)

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        def count(steering: str, result: str) -> None:
            self.counts[steering, result] += 1

        scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": headers}
        app = SteeringMiddleware(self.engine, self.front, count)  # type: ignore[arg-type]
        asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
        if not self.sent:
            return Reply(0, {}, b"")
        start, *rest = self.sent
        told = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], told, b"".join(part["body"] for part in rest))


Maker = Callable[..., Client]
