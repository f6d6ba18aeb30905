"""Which model a value was made for, and the one way in which this toolkit hashes.

`shape_id` hashes the numbers of the anatomy: a value made for another shape is refused. `weights_id` hashes the
weights, where that is known cheaply: other weights of the same shape earn a warning. `tokenizer_id` hashes the
vocabulary, so that token ids of one tokenizer are never read with another. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from steer.errors import SteerError

UNKNOWN = "unknown"


def canonical(value: object) -> str:
    """Return the one JSON text of `value`: keys sorted, no spaces, UTF-8, numbers by shortest round trip.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: something in `value` has no JSON form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of `parts` in hexadecimal; lengths count, so that ("ab", "c") differs from ("a", "bc")."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def shape_id(numbers: Mapping[str, object]) -> str:
    """Return the id of a model's shape.

    Args:
        numbers: what the anatomy counts: family, layers, hidden size, heads, head width, vocabulary and the like.
    """
    return digest([canonical(numbers).encode()])


@runtime_checkable
class HasVocabulary(Protocol):
    """Any tokenizer that can list its vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        """Return every token, added ones too, with its id."""
        ...


def tokenizer_id(tokenizer: HasVocabulary) -> str:
    """Return the id of a tokenizer: the hash of its vocabulary, added tokens included.

    Chat template, padding side and special-token roles are left out: they do not change what a token id means.
    """
    return digest([canonical(tokenizer.get_vocab()).encode("utf-8", "surrogatepass")])


@dataclass(frozen=True)
class ModelIdentity:
    """Names a model well enough to refuse what was made for another.

    Attributes:
        name: how it was loaded, for the reader only.
        family: `model_type` of its configuration.
        shape_id: hash of its anatomy's numbers.
        weights_id: hash of its weights, or "unknown".
        tokenizer_id: hash of its vocabulary, or "unknown".
    """

    name: str
    family: str
    shape_id: str
    weights_id: str = UNKNOWN
    tokenizer_id: str = UNKNOWN

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> ModelIdentity:
        """Read what `to_dict` wrote.

        Raises:
            SteerError: keys are unknown or missing, or a value is not text.
        """
        names = [field.name for field in fields(cls)]
        if (
            not isinstance(data, Mapping)
            or set(data) != set(names)
            or not all(isinstance(data[name], str) for name in names)
        ):
            raise SteerError(
                f"the model identity holds {sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__}",
                f"text under exactly {', '.join(names)}",
                "Make the file again with this version",
            )
        return cls(**{name: data[name] for name in names})


def _differ(a: str, b: str) -> bool:
    return UNKNOWN not in (a, b) and a != b


def check_same(found: ModelIdentity | None, expected: ModelIdentity | None, what: str) -> None:
    """Refuse a value made for a model of another shape; warn when only the weights differ.

    Args:
        found: the model that `what` was made for; None skips the check.
        expected: the model at hand; None skips the check.
        what: the value, as the reader calls it, such as "the steering 'short'".

    Raises:
        SteerError: the shapes differ.
    """
    if found is None or expected is None:
        return
    if found.shape_id != expected.shape_id:
        raise SteerError(
            f"{what} was made for {found.name} ({found.family}, shape {found.shape_id[:12]})",
            f"one for {expected.name} ({expected.family}, shape {expected.shape_id[:12]})",
            "Make it again from this model's own traces, or load the model it was made for",
        )
    if _differ(found.weights_id, expected.weights_id):
        warnings.warn(
            f"{what} was made from other weights of the same shape ({found.name}, now {expected.name}); its effect may differ.",
            stacklevel=3,
        )


def check_tokenizer(found: str, expected: str, what: str) -> None:
    """Refuse token ids that were written by another tokenizer.

    Args:
        found: tokenizer id stored beside `what`.
        expected: tokenizer id of the model at hand.
        what: the value, as the reader calls it.

    Raises:
        SteerError: both ids are known and differ.
    """
    if _differ(found, expected):
        raise SteerError(
            f"{what} was made with another tokenizer ({found[:12]})",
            f"token ids of this model's tokenizer ({expected[:12]})",
            "Generate the traces again with this model, or rebuild them from text with steer.traces.from_text",
        )


def mix(first: ModelIdentity | None, second: ModelIdentity | None, what: str) -> ModelIdentity | None:
    """Return the one model that two values share; None where neither says.

    Raises:
        SteerError: they were made for different models.
    """
    if first is None or second is None:
        return first or second
    if first.shape_id != second.shape_id or _differ(first.weights_id, second.weights_id):
        raise SteerError(
            f"{what} come from two models, {first.name} and {second.name}",
            "values of one model",
            "Make both from the same model, or state that you mean it with dataclasses.replace(value, model=None)",
        )
    return first if first.weights_id != UNKNOWN else second


def known_keys(data: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Refuse keys that nobody reads, since a mistyped key would otherwise do nothing in silence.

    Raises:
        SteerError: `data` has a key outside `allowed`.
    """
    allowed = list(allowed)
    unknown = sorted(str(key) for key in data if key not in allowed)
    if unknown:
        raise SteerError(
            f"{where} has the unknown key {', '.join(map(repr, unknown))}",
            f"keys among {', '.join(allowed)}",
            "Correct the spelling or remove it",
        )
