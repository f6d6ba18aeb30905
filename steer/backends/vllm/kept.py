"""What a process keeps of what it has read: up to a number of bytes, least lately used first out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")
BYTES = 256 * 2**20


class Kept(Generic[Value]):
    """Values by name; threads may share it, as an engine core's input and its steps do.

    Args:
        most: bytes that may be kept; the last value stays, however large.
    """

    def __init__(self, most: int = BYTES) -> None:
        self.most, self.bytes = most, 0
        self._held: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str) -> Value | None:
        """Return a value that is still kept."""
        with self._lock:
            if name not in self._held:
                return None
            self._held.move_to_end(name)
            return self._held[name][0]

    def put(self, name: str, value: Value, size: int) -> None:
        """Keep a value of so many bytes."""
        with self._lock:
            if name in self._held:
                self.bytes -= self._held.pop(name)[1]
            self._held[name] = value, size
            self.bytes += size
            while self.bytes > self.most and len(self._held) > 1:
                self.bytes -= self._held.popitem(last=False)[1][1]
