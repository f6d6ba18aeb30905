"""64 clients at once, each reply compared with the same request alone; `make test-load` does it for two minutes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vllm import served
from tests.vllm.lab import Bench

pytestmark = pytest.mark.vllm
GROWTH = 1.05
SETTLED = 0.25
"""Share of the time after which memory has to be flat."""
SLACK = 64 << 20
"""Bytes that allocators may move in a short run."""


def test_no_reply_is_another_ones_and_memory_stays_flat(bench: Callable[[str], Bench]) -> None:
    found = served.seen(bench("chain"))["load"]
    assert found["faults"] == 0, found["wrong"]
    assert all(found["told"]) and sum(found["told"]) >= 64, found["told"]
    late = [sum(each.values()) for second, each in found["memory"] if second > SETTLED * found["seconds"]]
    half = len(late) // 2
    before, after = max(late[:half]), max(late[half:])
    assert after <= max(before * GROWTH, before + SLACK), (before, after)
