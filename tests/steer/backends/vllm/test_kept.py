"""What a process keeps is bounded in bytes, and what was used last stays."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from steer.backends.vllm.kept import Kept


def test_the_least_lately_used_goes_first_and_the_bytes_stay_below_the_bound():
    kept: Kept[int] = Kept(most=10)
    for number in range(3):
        kept.put(str(number), number, 4)
    assert (kept.get("0"), kept.get("1"), kept.get("2"), kept.bytes) == (None, 1, 2, 8)
    kept.get("1")
    kept.put("3", 3, 4)
    assert (kept.get("2"), kept.get("1"), len(kept)) == (None, 1, 2)


def test_one_value_is_kept_however_large_and_another_size_takes_its_place():
    kept: Kept[int] = Kept(most=10)
    kept.put("a", 1, 100)
    assert (kept.get("a"), kept.bytes) == (1, 100)
    kept.put("a", 2, 5)
    kept.put("b", 3, 5)
    assert (kept.get("a"), kept.get("b"), kept.bytes) == (2, 3, 10)


def test_threads_that_push_one_another_out_find_a_value_or_none():
    kept: Kept[int] = Kept(most=2)

    def work(seed: int) -> None:
        for step in range(3000):
            name = str((seed + step) % 5)
            assert kept.get(name) in (None, int(name))
            kept.put(name, int(name), 1)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert kept.bytes == len(kept) == 2
