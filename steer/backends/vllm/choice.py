"""What acts on one prompt: the changes of a view and the one that a call asks for, as one steering and one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steer.backends.vllm.adapters import Adapter
from steer.backends.vllm.request import Asked, effective
from steer.backends.vllm.store import Store
from steer.errors import SteerError
from steer.steering import Steering

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What acts on a prompt; the default does nothing.

    Attributes:
        name: for the reader.
        base: of the steering in the store; None without one.
        coefficient, phase: of the request.
        fingerprint: of what acts, strength and phase included; None where nothing of the steering is left.
        adapter: None without one.
    """

    name: str = ""
    base: str | None = None
    coefficient: float = 1.0
    phase: str | None = None
    fingerprint: str | None = None
    adapter: Adapter | None = None

    def extra(self, marks_from: int) -> dict[str, Any]:
        """Return `extra_args` of a request whose marks count from a token on."""
        if self.base is None:
            return {}
        return Asked(self.name, self.base, self.coefficient, self.phase, marks_from).to_args()

    def to_dict(self) -> dict[str, Any]:
        """Return what `run.yaml` says."""
        told: dict[str, Any] = {}
        if self.base is not None:
            told |= {"steering": self.name, "fingerprint": self.fingerprint, "base": self.base}
            told |= {"coefficient": self.coefficient, "phase": self.phase}
        if self.adapter is not None:
            told |= {"adapter": self.adapter.name, "adapter_fingerprint": self.adapter.fingerprint}
        return told


def of_steerings(
    parts: Sequence[tuple[Steering, float]], wanted: Steering | None, coefficient: float, phase: str | None
) -> tuple[Steering, float, str | None] | None:
    """Return the one steering that a view's changes and what a call asks for make, with coefficient and phase.

    A single one keeps its own; several are joined at theirs. None where there is none, or nothing is left of them.

    Raises:
        SteerError: a coefficient that has no meaning for a steering.
    """
    if wanted is not None and not parts:
        return wanted, coefficient, phase
    if wanted is None and len(parts) == 1:
        return (*parts[0], None)
    several: list[tuple[Steering, float, str | None]] = [(each, c, None) for each, c in parts]
    acting = [effective(*part) for part in [*several, *([] if wanted is None else [(wanted, coefficient, phase)])]]
    left = [each for each in acting if each is not None]
    if not left:
        return None
    name = " + ".join(each.name for each in left if each.name)
    return Steering(tuple(one for each in left for one in each.interventions), name=name), 1.0, None


def the_adapter(asked: Sequence[tuple[Adapter, float, str | None]]) -> Adapter | None:
    """Return the adapter of a request.

    Raises:
        SteerError: several, a coefficient but 1, or a phase.
    """
    for each in asked:
        _check_adapter(*each)
    if len(asked) > 1:
        names = ", ".join(repr(adapter.name) for adapter, _, _ in asked)
        raise SteerError(
            f"the adapters {names} were asked for together",
            "one adapter per request",
            "Make one patch of them (Patch.compose), or apply one to the checkpoint",
        )
    return asked[0][0] if asked else None


def kept(
    steering: Steering, coefficient: float, phase: str | None, store: Store, name: str, adapter: Adapter | None
) -> Choice:
    """Keep a steering in the store and say what acts.

    Raises:
        SteerError: a `Custom` function, or a coefficient without meaning.
    """
    base = store.put(steering)
    acting = effective(steering, coefficient, phase)
    return Choice(name, base, float(coefficient), phase, None if acting is None else acting.fingerprint, adapter)


def _check_adapter(adapter: Adapter, coefficient: float, phase: str | None) -> None:
    """Refuse a coefficient and a phase: weights act on every token alike."""
    if coefficient != 1:
        raise SteerError(
            f"the adapter {adapter.name!r} was asked for with coefficient {coefficient:g}",
            "1: the weights of an adapter are what they are",
            "Give SteeredLLM(adapters=…) the patch at that strength, patch.scaled(c)",
        )
    if phase is not None:
        raise SteerError(
            f"the adapter {adapter.name!r} was asked for in phase {phase!r}",
            "no phase: weights act on every token alike",
            "Use the hook form of the change",
        )


def named(name: str, steerings: Mapping[str, Steering], adapters: Mapping[str, Adapter]) -> Steering | Adapter:
    """Look a name up.

    Raises:
        SteerError: nobody gave anything of that name.
    """
    if name in steerings:
        return steerings[name]
    if name in adapters:
        return adapters[name]
    known = ", ".join(sorted({*steerings, *adapters})) or "none was given"
    raise SteerError(f"there is no steering {name!r}", known, "Give it to SteeredLLM(steerings=…) or (adapters=…), or pass the steering itself")  # fmt: skip


def per_prompt(value: T | Sequence[T], count: int, what: str) -> list[T]:
    """Return one value per prompt: those of a list, or the same for all.

    Raises:
        SteerError: a list of another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise SteerError(f"{len(value)} {what} were given for {count} prompts", "one for all, or a list with one per prompt")  # fmt: skip
    return list(value)
