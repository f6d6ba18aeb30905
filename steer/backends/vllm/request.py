"""What a request asks for, before and after the front process has resolved it.

A caller writes, in `SamplingParams.extra_args` (over HTTP `vllm_xargs`):

| key | meaning |
|---|---|
| `steering` | the name; for the reader, in answers and counters |
| `steering_base` | fingerprint of the steering in the store; `SteeredLLM` and the server write it |
| `steering_coefficient` | c of DESIGN §2; 1 if absent |
| `steering_phase` | takes the place of every intervention's own phase; absent: their own |
| `steering_prompt` | where marks of the prompt count: "raw" (default), "chat", or the first token's number |

The front process replaces them by `steering`: `Request.to_dict()`, the only form that the engine lets in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from steer.errors import SteerError
from steer.identity import known_keys
from steer.interventions import Custom
from steer.marks import Marks
from steer.phases import check_phase
from steer.steering import Steering

KEY = "steering"
ASKED = ("steering", "steering_base", "steering_coefficient", "steering_phase", "steering_prompt")
OTHER = ("steering_capture",)
"""Keys with the same beginning that belong to others."""


@dataclass(frozen=True)
class Asked:
    """What a caller wrote.

    Attributes:
        name, base, coefficient, phase: see the module.
        prompt: "raw", "chat", or the first prompt token at which a mark counts.
    """

    name: str
    base: str
    coefficient: float = 1.0
    phase: str | None = None
    prompt: str | int = "raw"

    def to_args(self) -> dict[str, Any]:
        """Return the entries of `extra_args`."""
        told = {f"{KEY}_{name}": value for name, value in asdict(self).items() if name != "name" and value is not None}
        return {KEY: self.name, **told}


@dataclass(frozen=True)
class Request:
    """What the engine runs for one request.

    Attributes:
        fingerprint: of what acts, strength and phase included: the slot.
        base: of the steering in the store.
        name: for the reader.
        coefficient: c.
        phase: in place of the interventions' own; None: their own.
        prompt_length: P.
        marks_from: first prompt token at which a mark counts.
        in_prompt: whether something acts before the prompt's last token.
        positional: whether it matters how long the prompt is: some phase but `all` takes part.
    """

    fingerprint: str
    base: str
    name: str
    coefficient: float
    phase: str | None
    prompt_length: int
    marks_from: int
    in_prompt: bool
    positional: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Any) -> Request:
        """The inverse of `to_dict`.

        Raises:
            SteerError: something is missing or unknown.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(plain, Mapping) or set(plain) != set(names):
            raise SteerError(
                f"a request reached the engine with steering {plain!r}",
                "what the front process made of it",
                "The plugin did not run there: install reasoning-steer in the environment of the API server too",
            )
        return cls(**plain)


def asked(extra_args: Mapping[str, Any] | None) -> Asked | None:
    """Read what a caller wrote; None where no steering is asked for.

    Raises:
        SteerError: an unknown key, or a value of the wrong kind.
    """
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith(KEY) and key not in OTHER}
    if not given:
        return None
    known_keys(given, ASKED, "the request")
    name, base = given.get(KEY), given.get(f"{KEY}_base")
    if not isinstance(name, str) or not name:
        raise SteerError(f"the request asks for steering {name!r}", "a name", "GET /steerings lists them")
    if not isinstance(base, str) or not base:
        raise SteerError(
            f"the request asks for steering {name!r}, and nobody looked the name up",
            "a request through `steer serve` or SteeredLLM",
            "They add steering_base, the fingerprint in the store",
        )
    return Asked(name, base, _number(given), _phase(given), _prompt(given))


def _number(given: Mapping[str, Any]) -> float:
    number = given.get(f"{KEY}_coefficient", 1.0)
    if isinstance(number, int) and number.bit_length() > sys.float_info.max_exp:
        raise SteerError(
            f"steering_coefficient is a whole number of {number.bit_length()} bits", "one that a float holds"
        )
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise SteerError(f"steering_coefficient is {number!r}", "a finite number")
    return float(number)


def _phase(given: Mapping[str, Any]) -> str | None:
    phase = given.get(f"{KEY}_phase")
    if phase is not None:
        check_phase(phase, None)
    return phase


def _prompt(given: Mapping[str, Any]) -> str | int:
    prompt = given.get(f"{KEY}_prompt", "raw")
    if isinstance(prompt, bool) or not (prompt in ("raw", "chat") or (isinstance(prompt, int) and prompt >= 0)):
        raise SteerError(f"steering_prompt is {prompt!r}", "raw, chat, or the number of the first token at which a mark counts")  # fmt: skip
    return prompt  # type: ignore[no-any-return]


def effective(steering: Steering, coefficient: float, phase: str | None) -> Steering | None:
    """Return what acts: phases replaced, the coefficient multiplied in, what does nothing left out; None for nothing.

    Raises:
        SteerError: a coefficient that has no meaning for an intervention.
    """
    scaled = steering.scaled(coefficient)
    acting = tuple(each for each in scaled.interventions if isinstance(each, Custom) or not each.is_zero(1.0))
    if phase is not None:
        acting = tuple(replace(each, phase=phase) for each in acting)
    return replace(scaled, interventions=acting) if acting else None


def marks_from(prompt: str | int, token_ids: Sequence[int], marks: Marks, endings: Sequence[Sequence[int]]) -> int:
    """Return the first prompt token at which a mark counts.

    Args:
        prompt: as in `Asked`.
        token_ids: the prompt.
        marks: of the tokenizer.
        endings: what the chat template may append for a reply, as tokens; the longest that fits is taken.

    Raises:
        SteerError: a chat prompt that ends with none of them, or a number behind the prompt.
    """
    ids = tuple(token_ids)
    if isinstance(prompt, int):
        if prompt > len(ids):
            raise SteerError(f"steering_prompt is {prompt}", f"at most the prompt's {len(ids)} tokens")
        return prompt
    if prompt == "raw":
        return marks.raw_text_start(ids)
    fitting = [len(end) for end in endings if end and ids[len(ids) - len(end) :] == tuple(end)]
    if not fitting:
        raise SteerError(
            "the chat prompt does not end with what the template appends for a reply, so nobody knows where its marks count",
            "a conversation that ends with a user's message",
            "Leave continue_final_message and add_generation_prompt as they are, or use phase all, prompt or generated",
        )
    return len(ids) - max(fitting)
