"""One request: what its body asks for, who asks, and what is therefore served, or why not.

| `vllm_xargs` | meaning |
|---|---|
| `steering` | a name of the folder; `none` for the model as it is; absent: the server's default |
| `steering_coefficient` | c, a number; 1 if absent |
| `steering_phase` | in place of the phases that the file says |

Everything else that begins with `steering` is refused. What was decided is written back into `vllm_xargs` in the words
of `steer.backends.vllm.request`, with the fingerprint under which the store keeps what was checked here, so that the
engine runs that, whatever happens to the file.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from steer.backends.vllm import request
from steer.backends.vllm.request import KEY
from steer.backends.vllm.server.directory import Entry
from steer.backends.vllm.server.settings import NONE, Key, Settings
from steer.errors import SteerError
from steer.phases import check_phase

ARGUMENTS = "vllm_xargs"
WORDS = (KEY, f"{KEY}_coefficient", f"{KEY}_phase")
UNSTEERABLE = {
    "use_beam_search": "vLLM's beam search hands its beams to the engine without the request's arguments",
    "prompt_embeds": "a prompt of embeddings has no tokens in which phases could be told",
}
Prompt = Literal["chat", "raw"]


class RequestError(SteerError):
    """A request that is not served.

    Args:
        status: of the HTTP reply.
        found, expected, remedy: as in `SteerError`.
        name: what counters call it: a name of the folder, or "unknown".
    """

    def __init__(self, status: int, found: str, expected: str = "", remedy: str = "", name: str = "unknown") -> None:
        super().__init__(found, expected, remedy)
        self.status, self.name = status, name


class Offer(Protocol):
    """The folder of steerings, as far as a request is concerned."""

    def names(self) -> tuple[str, ...]:
        """Return every name."""
        ...

    def find(self, name: str, most: int) -> Entry | None:
        """Return what a name stands for at this moment."""
        ...


@dataclass(frozen=True)
class Ask:
    """What a body asks for.

    Attributes:
        name: None where it names no steering.
        coefficient: c; None where it says none.
        phase: None where it says none.
    """

    name: str | None = None
    coefficient: float | None = None
    phase: str | None = None


@dataclass(frozen=True)
class Served:
    """What a request gets.

    Attributes:
        name: of the steering; `none` or `off` where nothing is steered.
        entry: what it stands for; None where nothing is steered.
        coefficient: c.
        phase: in place of the interventions' own; None: their own.
    """

    name: str
    entry: Entry | None = None
    coefficient: float = 1.0
    phase: str | None = None

    def told(self) -> dict[str, Any]:
        """Return what the reply says: name, fingerprint, coefficient, phase ("own" for the file's)."""
        if self.entry is None:
            return {"steering": self.name}
        fingerprint = self.entry.fingerprint
        return {
            "steering": self.name,
            "fingerprint": fingerprint,
            "coefficient": self.coefficient,
            "phase": self.phase or "own",
        }

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The same as headers of the reply."""
        rows = self.told()
        return tuple(
            (b"x-steering" if word == KEY else f"x-steering-{word}".encode(), _text(value).encode())
            for word, value in rows.items()
        )


OFF, PLAIN = Served("off"), Served(NONE)


def who(authorization: str | None, secret_keys: Sequence[tuple[str, Key]]) -> Key | None:
    """Return the key that a request shows, or None where no key is asked for.

    Args:
        authorization: the header, each byte as the character of that number.
        secret_keys: each key, as the environment has it, with what it may do.

    Raises:
        RequestError: 401, no key or an unknown one.
    """
    if not secret_keys:
        return None
    scheme, _, shown = (authorization or "").partition(" ")
    found = None
    for secret, key in secret_keys:
        if secrets.compare_digest(os.fsencode(secret), shown.encode("latin-1", "backslashreplace")):
            found = key
    if found is None or scheme.lower() != "bearer":
        raise RequestError(401, "the request shows no key that is known here", "Authorization: Bearer KEY")
    return found


def said(body: Mapping[str, Any]) -> Ask:
    """Read what a body asks for.

    Raises:
        RequestError: 400, an unknown word that begins with `steering`, or a value of the wrong kind.
    """
    arguments = body.get(ARGUMENTS)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RequestError(400, f"{ARGUMENTS} is no object", '{"steering": NAME}')
    words = [word for word in (*arguments, *body) if isinstance(word, str) and word.lower().startswith(KEY)]
    unknown = [word for word in words if word not in WORDS or word in body]
    if unknown:
        remedy = "They belong into vllm_xargs" if unknown[0] in WORDS else ""
        raise RequestError(400, f"the request says {unknown[0][:60]!r}", f"{', '.join(WORDS)} in {ARGUMENTS}", remedy)
    name, number, phase = (arguments.get(word) for word in WORDS)
    if name is not None and not isinstance(name, str):
        raise RequestError(400, "the steering that is asked for is no text", "a name; GET /steerings lists them")
    if number is not None and not _is_number(number):
        raise RequestError(400, f"{WORDS[1]} is {_short(number)}", "a finite number")
    if phase is not None:
        _check_phase(phase)
    return Ask(name, None if number is None else float(number), phase)


def decide(ask: Ask, settings: Settings, key: Key | None, offer: Offer) -> Served:
    """Decide what a request gets.

    Raises:
        RequestError: 400, an unknown name (with the list), one that cannot be served, a coefficient out of the limits or
            without meaning, a coefficient or a phase without a steering; 403, a name that the key may not ask for.
        OSError: the folder cannot be read.
    """
    if not settings.enabled:
        return OFF
    default = settings.default
    if (ask.name is None and default is None) or ask.name == NONE:
        if ask.coefficient is not None or ask.phase is not None:
            raise RequestError(
                400, "the request asks for a coefficient or a phase, and for no steering", "a steering too"
            )
        if ask.name == NONE and default is not None:
            _check_allowed(NONE, key)
        return PLAIN
    if ask.name is None and default is not None:
        if ask.coefficient is not None or ask.phase is not None:
            raise RequestError(
                400,
                "the request asks for a coefficient or a phase, and for no steering by name",
                "the name too, since the server's default has its own",
                name=default.steering,
            )
        entry = _entry(default.steering, settings, None, offer)
        return _checked(entry, default.coefficient, default.phase)
    name = str(ask.name)
    _check_allowed(name, key)
    entry = _entry(name, settings, key, offer)
    coefficient = 1.0 if ask.coefficient is None else ask.coefficient
    limits = settings.within(name)
    if limits is not None and not limits[0] <= coefficient <= limits[1]:
        expected = f"{limits[0]:g} to {limits[1]:g}, the limits of this server for {name!r}"
        raise RequestError(400, f"the coefficient is {coefficient:g}", expected, name=name)
    return _checked(entry, coefficient, ask.phase)


def rewritten(
    body: Mapping[str, Any], served: Served, prompt: Prompt, base: str, adapters: Sequence[str], model: str
) -> dict[str, Any]:
    """Return the body for vLLM.

    Args:
        body: as it came.
        served: what was decided.
        prompt: which endpoint it came to.
        base: under which the store keeps the steering; empty for an adapter and where nothing is steered.
        adapters: names that vLLM knows as models, which are chosen by `steering` only.
        model: the name of the model itself.

    Raises:
        RequestError: 400, an adapter asked for as a model, or something that runs unsteered in vLLM.
    """
    arguments = {word: value for word, value in (body.get(ARGUMENTS) or {}).items() if word not in WORDS}
    check_model(body, adapters, model)
    changed = dict(body)
    if served.entry is not None:
        for word, reason in UNSTEERABLE.items():
            if body.get(word):
                raise RequestError(
                    400, f"{word} cannot be steered: {reason}", "", "Leave one of the two out", served.name
                )
        if served.entry.adapter:
            if body.get("model") in (None, model):
                changed["model"] = served.name
        else:
            asked = request.Asked(served.name, base, served.coefficient, served.phase, prompt)
            arguments |= asked.to_args()
    changed.pop(ARGUMENTS, None)
    return changed | ({ARGUMENTS: arguments} if arguments else {})


def check_model(body: Mapping[str, Any], adapters: Sequence[str], model: str) -> None:
    """Refuse an adapter that is asked for as a model, past the switch and the keys; arguments as of `rewritten`.

    Raises:
        RequestError: 400.
    """
    if body.get("model") in adapters:
        raise RequestError(
            400,
            f"the adapter {body['model']!r} is asked for as a model",
            f'{ARGUMENTS}: {{"steering": NAME}}',
            f"Ask for the model {model!r}",
        )


def _entry(name: str, settings: Settings, key: Key | None, offer: Offer) -> Entry:
    entry = offer.find(name, settings.file_bytes)
    if entry is None:
        names = [each for each in offer.names() if key is None or key.may(each)]
        raise RequestError(400, f"there is no steering {_short(name)}", f"one of {', '.join([NONE, *names])}")
    if entry.problem:
        raise RequestError(400, f"the steering {name!r} cannot be served", "", entry.problem, name)
    return entry


def _checked(entry: Entry, coefficient: float, phase: str | None) -> Served:
    """Refuse a coefficient without meaning; coefficient 0, or nothing left to do, is no steering."""
    if entry.adapter:
        if coefficient != 1 or phase not in (None, "all"):
            raise RequestError(
                400,
                f"{entry.name!r} is an adapter, whose strength and phase lie in its weights",
                "coefficient 1 and phase all",
                "Export it at another strength with steer export, into a folder of another name",
                entry.name,
            )
        return Served(entry.name, entry)
    try:
        left = None if entry.steering is None else request.effective(entry.steering, coefficient, phase)
    except SteerError as error:
        raise RequestError(400, error.found, error.expected, error.remedy, entry.name) from None
    return PLAIN if left is None else Served(entry.name, entry, coefficient, phase)


def _check_allowed(name: str, key: Key | None) -> None:
    if key is not None and not key.may(name):
        allowed = ", ".join(key.allow or ()) or "nothing"
        raise RequestError(403, f"this key may not ask for steering {_short(name)}", f"one of: {allowed}")


def _check_phase(phase: object) -> None:
    if not isinstance(phase, str):
        raise RequestError(400, f"{WORDS[2]} is {_short(phase)}", "a phase")
    try:
        check_phase(phase, None)
    except SteerError as error:
        raise RequestError(400, error.found, error.expected, error.remedy) from None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 and math.isfinite(value)


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…'"
