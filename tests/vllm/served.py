"""What is asked of a server, and what it has to answer. The server runs once, whichever test asks first."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

import steer
from edits.lora import export_lora
from steer import Add, ProjectOut, SetComponent, Steering
from steer.patches import Patch
from tests.vllm import naive
from tests.vllm.cases import QUESTIONS, direction
from tests.vllm.lab import ENVIRONMENT, PYTHON, ROOT, Bench

LONGEST = 780
KEYS = {"all": "key-of-everybody", "team": "key-of-a-team"}
NAMES = {"all": "STEER_TEST_ALL", "team": "STEER_TEST_TEAM"}
SETTINGS = {
    "keys": [{"env": NAMES["all"]}, {"env": NAMES["team"], "allow": ["add"]}],
    "limits": {"other": [0.0, 2.0]},
    "body_bytes": 20_000,
}
CACHE = 64 << 20
"""Bytes of the key-value cache: small enough that all of it has been touched soon, or memory would seem to grow."""
OPTIONS = (
    "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--block-size", "32",
    "--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(CACHE), "--distributed-executor-backend", "uni", "--disable-uvicorn-access-log",
)  # fmt: skip
MALFORMED = {
    "no JSON": ("/v1/completions", b"{"),
    "no object": ("/v1/chat/completions", b"[1]"),
    "nested": ("/v1/completions", b"[" * 10_000),
    "not finite": ("/v1/completions", b'{"temperature": NaN}'),
    "too large": ("/v1/completions", b" " * 30_000),
    "nothing in it": ("/v1/completions", b"{}"),
    "arguments of another kind": ("/v1/completions", b'{"model": "chain", "prompt": "a", "vllm_xargs": 3}'),
    "another endpoint": ("/v1/responses", b'{"model": "chain", "input": "a"}'),
}
REFUSED: dict[str, dict[str, Any]] = {
    "unknown": {"words": {"steering": "clam"}},
    "limit": {"words": {"steering": "other", "steering_coefficient": 3}},
    "not finite": {"words": {"steering": "add", "steering_coefficient": 1e300}},
    "phase": {"words": {"steering": "add", "steering_phase": "dreaming"}},
    "no form": {"words": {"steering": "unfit"}},
    "broken": {"words": {"steering": "broken"}},
    "fingerprint": {"words": {"steering": "add", "steering_base": "f" * 64}},
    "beams": {"words": {"steering": "add"}, "more": {"use_beam_search": True}},
    "strength of weights": {"words": {"steering": "heads", "steering_coefficient": 0.5}},
}


@dataclass(frozen=True)
class Asked:
    """One request to the server, and what an independent computation says of it."""

    chat: bool
    content: str
    name: str | None = None
    coefficient: float = 1.0
    phase: str | None = None
    tokens: int = 20

    def plain(self, **more: Any) -> dict[str, Any]:
        """As the job has it."""
        words = {"steering": self.name, "steering_coefficient": self.coefficient, "steering_phase": self.phase}
        given = {} if self.name is None else {word: value for word, value in words.items() if value is not None}
        return {"chat": self.chat, "content": self.content, "words": given, "tokens": self.tokens, "more": more}


def asks() -> tuple[Asked, ...]:
    """Differently steered requests to both endpoints."""
    texts = ["a = 3 ; b = a + 4 ; ? b", "c = 7 ; d = c + 1 ;"]
    return (
        Asked(True, QUESTIONS[0]),
        Asked(True, QUESTIONS[1], "add"),
        Asked(True, QUESTIONS[2], "add", -2.0),
        Asked(True, QUESTIONS[3], "other", 0.5, "generated"),
        Asked(True, QUESTIONS[4], "parts"),
        Asked(True, QUESTIONS[6], "add", 0.5, "thinking"),
        Asked(True, QUESTIONS[7], "heads"),
        Asked(False, texts[0]),
        Asked(False, texts[1], "other"),
        Asked(False, texts[0], "add", 1.5, "prompt"),
    )


CHANGING = Asked(True, QUESTIONS[0], "changing", tokens=60)


def seen(bench: Bench) -> dict[str, Any]:
    """Run the server and its clients once, and return what they saw."""
    place = bench.folder / "server"
    place.mkdir(exist_ok=True)
    with FileLock(bench.folder / "server.lock"):
        if not (place / "log.txt").is_file():
            _run(bench, place)
    found: dict[str, Any] = json.loads((place / "result.json").read_text()) if (place / "result.json").is_file() else {}
    if "end" not in found:
        said = "".join(path.read_text(errors="replace")[-6000:] for path in (place / "log.txt", place / "server.txt") if path.is_file())  # fmt: skip
        pytest.fail(f"the server fell; the end of what was said:\n{said}")
    return found


def _run(bench: Bench, place: Path) -> None:
    steerings, spare = place / "steerings", place / "spare"
    for name, steering in ours(bench).items():
        steering.save(steerings / f"{name}.yaml")
    (steerings / "broken.yaml").write_text("{")
    export_lora(heads(bench), bench.model, steerings / "heads")
    for name, steering in (("first", ours(bench)["changing"]), ("other", changed(bench))):
        steering.save(spare / f"{name}.yaml")
    (place / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--steerings", steerings, "--settings", place / "settings.yaml", "--name", "chain", "--port", port]
    more = ["--max-num-seqs", 64, "--store", place / "store", "--quiet", "--", *OPTIONS]
    job = {
        "command": [str(word) for word in (PYTHON, "-m", "steer.cli", "serve", bench.model, *words, *more)],
        "environment": {**ENVIRONMENT, **{NAMES[who]: key for who, key in KEYS.items()}},
        "port": port, "keys": KEYS, "model": "chain", "folder": str(steerings), "spare": str(spare),
        "settings": str(place / "settings.yaml"), "asks": [ask.plain() for ask in asks()], "changing": CHANGING.plain(),
        "others": {"budget": Asked(True, QUESTIONS[0], "add", tokens=30).plain(thinking_token_budget=6)},
        "refused": REFUSED, "allowed": ["add", "other", "none"],
        "malformed": {name: (path, data.hex()) for name, (path, data) in MALFORMED.items()},
        "seconds": float(os.environ.get("STEER_LOAD_SECONDS", "10")), "clients": 64,
        "doctor": [str(PYTHON), "-m", "steer.cli", "doctor", "--server", f"http://127.0.0.1:{port}", "--key-env", NAMES["all"], "--json"],
    }  # fmt: skip
    (place / "job.json").write_text(json.dumps(job))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTHON", "STEER_"))}
    own = {"VLLM_CACHE_ROOT": str(place.parent / "engines" / "cache"), "XDG_CACHE_HOME": str(place / "cache")}
    with (place / "log.txt").open("w") as said:
        command = [str(PYTHON), str(ROOT / "tests" / "vllm" / "serve.py"), "job.json", "result.json"]
        subprocess.run(command, cwd=place, env={**inherited, **own}, stdout=said, stderr=said, timeout=LONGEST, check=False)  # fmt: skip


def ours(bench: Bench) -> dict[str, Steering]:
    """The steerings of the folder."""
    hidden = steer.load(str(bench.model)).anatomy.hidden
    changing = Steering((Add(direction(hidden, (1, 3), "resid_post", 11, norm=4.0), "resid_post"),))
    unfit = Steering((SetComponent(direction(hidden, (1,), "resid_post", 12, norm=1.0), "resid_post", 1.0),))
    known = {name: bench.steerings[name] for name in ("add", "other", "parts")}
    return {**known, "changing": changing, "unfit": unfit}


def changed(bench: Bench) -> Steering:
    """What lies under the name `changing` later."""
    hidden = steer.load(str(bench.model)).anatomy.hidden
    return Steering((Add(direction(hidden, (1, 3), "resid_post", 15, norm=8.0), "resid_post"),))


def heads(bench: Bench) -> Patch:
    """A patch of heads, which is served as an adapter."""
    anatomy = steer.load(str(bench.model)).anatomy
    layers = tuple(range(anatomy.layers - 1))
    vector = direction(anatomy.hidden, layers, "resid_post", 14, norm=1.0)
    every = tuple((layer, head) for layer in layers for head in range(anatomy.heads))
    return Patch.from_steering(Steering((ProjectOut(vector, "head_out", weight=4.0, heads=every),)), bench.model)


@cache
def expected(bench: Bench, asked: Asked, steering: Steering | None = None) -> tuple[tuple[int, ...], naive.Reply]:
    """The prompt's tokens, and what plain hooks (or patched weights) write; `steering` lies under the name if given."""
    model = steer.load(str(bench.model))
    content = [{"role": "user", "content": asked.content}] if asked.chat else steer.RawText(asked.content)
    prompt = model.render(content)
    if asked.name == "heads":
        with heads(bench).on(model):
            return prompt.token_ids, naive.greedy(model.hf, prompt.token_ids, asked.tokens)
    steering = ours(bench)[asked.name] if asked.name and steering is None else steering
    start = prompt.generation_prompt_start
    return prompt.token_ids, naive.greedy(
        model.hf, prompt.token_ids, asked.tokens, steering, asked.coefficient, asked.phase, bench.marks, start
    )
