"""Kills and full disks for whatever writes a folder: a forked process that is killed, a disk that refuses from some byte on."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edits.checkpoint.folder import partial_name
from tests.edits.material import contents

Work = Callable[[Path, bool], object]
MOMENTS = 20


def killed_after(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a forked process, send it SIGKILL after some time, and say whether that met it alive."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def survives_kills(work: Work, place: Path, *, moments: int = MOMENTS, seed: int = 0) -> Counter[str]:
    """Kill `work` at random moments of its run, and check what it leaves each time.

    Args:
        work: writes the new folder that it is given; the second argument says whether to go on with a partial one.
        place: an empty folder to work in.
        moments: how many kills; each falls into the time that an undisturbed run takes.
        seed: draws the moments.

    Returns:
        How often there was nothing, a partial folder, or the finished one; whatever it was, a run that was told to go on
        has ended with the bytes of an undisturbed run.
    """
    begun = time.perf_counter()
    work(place / "undisturbed", False)
    spent = time.perf_counter() - begun
    expected, chance, found = contents(place / "undisturbed"), random.Random(seed), Counter[str]()
    while sum(found.values()) < moments:
        out = place / f"out{sum(found.values())}"
        killed = killed_after(lambda out=out: work(out, False), chance.uniform(0, spent))  # type: ignore[misc]
        left = {path.name for path in place.iterdir() if path.name.startswith(out.name)}
        if out.exists():
            assert left == {out.name}
            found["finished"] += 1
        else:
            assert killed and left <= {partial_name(out).name}
            found["partial" if left else "nothing"] += 1
            work(out, True)
        assert contents(out) == expected and not partial_name(out).exists()
        shutil.rmtree(out)
    return found


@contextmanager
def full_after(number: int) -> Iterator[None]:
    """Let the disk take `number` bytes and refuse the next one, by a short write and then ENOSPC, as a full disk does."""
    left, patch = [number], pytest.MonkeyPatch()
    pwrite, copy = os.pwrite, os.copy_file_range

    def granted(count: int) -> int:
        if count and not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = min(count, left[0])
        left[0] -= count
        return count

    def limited_write(descriptor: int, data: bytes, place: int) -> int:
        return pwrite(descriptor, data[: granted(len(data))], place)

    def limited_copy(source: int, target: int, count: int, *places: int) -> int:
        return copy(source, target, granted(count), *places)

    with patch.context() as patched:
        patched.setattr(os, "pwrite", limited_write)
        patched.setattr(os, "copy_file_range", limited_copy)
        yield


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes; skips the test where that is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk; ENOSPC is injected in another test")
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here ({made.stderr.strip()}); ENOSPC is injected in another test")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
