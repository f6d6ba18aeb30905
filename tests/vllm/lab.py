"""The laboratory of the lane: engines that run once, whoever asks, each in a process of its own.

A test writes a `Job`; what the engine answered is kept in a folder that all workers of pytest-xdist share, by the job's
hash. An engine that fell is not started again: whoever asks for it reads the end of what it said.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import steer
from steer import Steering
from steer.backends.vllm import Declared, Store
from steer.backends.vllm.request import Asked
from steer.marks import Marks
from tests.vllm import naive

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
LONGEST = 600
"""Seconds that an engine may take; the machine may be busy."""
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 512, "block_size": 32}
OPTIONS: dict[str, Any] = {**ENGINE, "seed": 0, "enable_prefix_caching": False, "enforce_eager": True}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_PLUGINS": "steer",  # Others that lie in .venv would be loaded, too.
}  # fmt: skip
SAME = 1e-5
CLEAR = 1e-4


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, and how it is to be steered."""

    prompt: tuple[int, ...]
    steering: str | None = None
    coefficient: float = 1.0
    phase: str | None = None
    start: int | str = 0
    """First token at which a mark counts; "chat": where the template's ending begins."""
    tokens: int = 20

    @property
    def plain(self) -> Ask:
        """The same prompt, unsteered."""
        return Ask(self.prompt, tokens=self.tokens)


@dataclass(frozen=True)
class Answer:
    """What vLLM answered."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int | None = None
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """What an engine did: answers by round and request, its counters, and what it said."""

    rounds: list[list[Answer]]
    counters: dict[str, float]
    said: str


@dataclass(frozen=True)
class Bench:
    """A model in a folder, the steerings that its requests may name, and where engines are kept.

    Attributes:
        folder: shared by all workers.
        model: folder of the checkpoint.
        steerings: by name.
        undeclared: further ones that lie in the store, for which the engine was not started.
        marks: of the tokenizer, or others.
        endings: what the template may append for a reply.
    """

    folder: Path
    model: Path
    steerings: dict[str, Steering]
    marks: Marks = field(default_factory=Marks)
    endings: tuple[tuple[int, ...], ...] = ()
    undeclared: dict[str, Steering] = field(default_factory=dict)

    def __hash__(self) -> int:
        return id(self)

    @cache  # noqa: B019  (a bench lives as long as the session)
    def loaded(self) -> Any:
        """Transformers' own model."""
        return steer.load(str(self.model)).hf

    @cache  # noqa: B019
    def declared(self) -> Declared:
        """What the engine is told; every steering lies in the store then."""
        (self.folder / "store").mkdir(exist_ok=True)
        store = Store(self.folder / "store")
        for steering in (*self.steerings.values(), *self.undeclared.values()):
            store.put(steering)
        anatomy = steer.load(str(self.model)).anatomy
        return Declared.of(
            anatomy, store.folder, self.steerings.values(), slots=16, marks=self.marks, endings=self.endings
        )

    def extra(self, ask: Ask) -> dict[str, Any]:
        """The entries of `extra_args` that ask for the steering."""
        if ask.steering is None:
            return {}
        known = (self.steerings | self.undeclared).get(ask.steering)
        base = "f" * 64 if known is None else known.fingerprint
        return Asked(ask.steering, base, ask.coefficient, ask.phase, ask.start).to_args()

    def engine(
        self,
        *rounds: Sequence[Ask],
        plugin: bool = True,
        interpreted: bool = False,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Result:
        """Run an engine, or read what it answered; every round is one batch."""
        requests = [
            [{"prompt": list(ask.prompt), "tokens": ask.tokens, "extra": self.extra(ask)} for ask in asks]
            for asks in rounds
        ]
        steered = {"additional_config": self.declared().to_config()} if plugin else {}
        job = {
            "model": str(self.model), "options": {**OPTIONS, **steered, **options}, "interpreted": interpreted,
            "rounds": requests,
        }  # fmt: skip
        without = {} if plugin else {"VLLM_PLUGINS": ""}
        return run(self.folder, job, {**ENVIRONMENT, **without, **(environment or {})})

    @cache  # noqa: B019
    def expected(self, ask: Ask) -> naive.Reply:
        """The independent answer; no token of it is a close call."""
        steering = None if ask.steering is None else self.steerings[ask.steering]
        reply = naive.greedy(
            self.loaded(), ask.prompt, ask.tokens, steering, ask.coefficient, ask.phase, self.marks, ask.start
        )
        assert min(reply.margins) > CLEAR, (
            f"a close call in the reference: {min(reply.margins)} of {ask}; take another prompt"
        )
        return reply

    def check(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        """Compare answers with the independent ones: same tokens, logarithms of probabilities within 1e-5."""
        for ask, answer in zip(asks, answers, strict=True):
            expected = self.expected(ask)
            assert answer.error is None, answer.error
            assert answer.tokens == expected.tokens, ask
            assert farthest(answer.logprobs, expected.logprobs) <= SAME, ask

    def check_steered(self, asks: Sequence[Ask]) -> None:
        """Steering changes every reply that asks for it, or the comparison would say nothing."""
        for ask in asks:
            if ask.steering is not None:
                moved = farthest(self.expected(ask).logprobs, self.expected(ask.plain).logprobs)
                assert moved > 100 * SAME, f"{ask} is hardly steered: {moved}"


def farthest(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def run(folder: Path, job: dict[str, Any], environment: dict[str, str]) -> Result:
    """Run a job once, whichever worker asks first."""
    text = json.dumps([job, environment], sort_keys=True)
    place = folder / "engines" / hashlib.sha256(text.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    log, result = place / "log.txt", place / "result.json"
    with FileLock(place / "lock"):
        if not log.is_file():
            (place / "job.json").write_text(json.dumps(job))
            _start(place, log, result, environment)
    said = log.read_text(errors="replace")
    if not result.is_file():
        pytest.fail(f"an engine of vLLM fell; the end of {log}:\n{said[-6000:]}")
    plain = json.loads(result.read_text())
    rounds = [[Answer(**answer) for answer in answers] for answers in plain["rounds"]]
    return Result(rounds, plain["counters"], said)


def _start(place: Path, log: Path, result: Path, environment: dict[str, str]) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTHON", "STEER_"))}
    own = {"VLLM_CACHE_ROOT": str(place.parent / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(place.parent / "inductor")}
    command = [str(PYTHON), str(ROOT / "tests" / "vllm" / "engine.py"), "job.json", result.name]
    with log.open("w") as said:
        try:
            subprocess.run(
                command, cwd=place, env={**inherited, **own, **environment}, stdout=said, stderr=said, timeout=LONGEST, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said.write(f"\nit was stopped after {LONGEST} s\n")
