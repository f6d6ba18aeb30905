"""The library: what an admitted request does, as rows, read from the store once per process."""

from __future__ import annotations

from steer.backends.vllm.config import Declared
from steer.backends.vllm.kept import Kept
from steer.backends.vllm.lowering import Lowered, lower
from steer.backends.vllm.request import Request, effective
from steer.backends.vllm.store import Store
from steer.errors import SteerError
from steer.steering import Steering


class Library:
    """Steerings of the store, checked and lowered.

    Args:
        declared: what the engine was started for.

    Raises:
        SteerError: the store's folder is not there.
    """

    def __init__(self, declared: Declared) -> None:
        self.declared, self.store = declared, Store(declared.store)
        self._lowered: Kept[Lowered] = Kept()

    def acting(self, base: str, coefficient: float, phase: str | None) -> Steering | None:
        """Return what acts of a stored steering; None for nothing.

        Raises:
            SteerError: it is not there, a coefficient has no meaning for it, or it needs a place that was not declared.
        """
        steering = effective(self.store.get(base), coefficient, phase)
        if steering is not None:
            self.declared.check_places(steering)
        return steering

    def lowered(self, request: Request) -> Lowered:
        """Return a request's rows.

        Raises:
            SteerError: as `acting`; what acts is not what the request was admitted with.
        """
        known = self._lowered.get(request.fingerprint)
        if known is not None:
            return known
        steering = self.acting(request.base, request.coefficient, request.phase)
        if steering is None or steering.fingerprint != request.fingerprint:
            raise SteerError(
                f"the request for steering {request.name!r} was admitted with fingerprint {request.fingerprint}",
                f"{'none' if steering is None else steering.fingerprint}, which is what the store holds",
            )
        lowered = lower(steering, self.declared.experts, self.declared.chosen)
        self._lowered.put(request.fingerprint, lowered, lowered.bytes)
        return lowered
