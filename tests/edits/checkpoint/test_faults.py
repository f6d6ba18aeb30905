"""Kills, full disks and unwritable places: afterwards nothing, a partial folder that can be finished, or the result."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from edits.checkpoint import revert, stream
from edits.checkpoint.folder import partial_name
from steer.errors import SteerError
from tests.edits.material import contents, patch

pytestmark = pytest.mark.faults
Folder = Callable[..., Path]

SYSCALLS = ("copy_file_range", "fsync", "pwrite", "preadv", "open", "rename", "replace", "unlink", "mkdir")


def dying(work: Callable[[], object], after: int) -> bool:
    """Run `work` in a forked process that kills itself with SIGKILL at its `after`-th system call; say whether it died."""
    child = os.fork()
    if child == 0:
        left = [after]

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        for name in SYSCALLS:
            setattr(os, name, counted(getattr(os, name)))
        stream.STEP = 1 << 14
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def base(tiny_folder: Folder, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("qwen3", max_shard_size="60KB"), folder)
    return folder


def applied(base: Path, out: Path, resume: bool = False) -> Callable[[], object]:
    return lambda: patch().plan(base).apply(out, resume=resume, keep_undo=True)


def test_killed_at_any_call_it_resumes_to_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """SIGKILL before every fifth system call of the whole run, each time resumed by an ordinary run."""
    expected = contents(patch().plan(base).apply(tmp_path / "undisturbed", keep_undo=True).path)
    killed, after = 0, 1
    while dying(applied(base, out := tmp_path / f"out{after}"), after):
        killed += 1
        if not out.exists():
            found = {path.name for path in tmp_path.iterdir() if path.name.startswith(out.name)}
            assert found <= {f"{out.name}.partial"}
            patch().plan(base).apply(out, resume=True, keep_undo=True)
        assert contents(out) == expected, f"killed at call {after}"
        assert not partial_name(out).exists()
        shutil.rmtree(out)
        after += 5
    assert killed >= 20


def test_killed_again_and_again_it_gets_through(base: Path, tmp_path: Path) -> None:
    expected = contents(patch().plan(base).apply(tmp_path / "undisturbed", keep_undo=True).path)
    out, runs = tmp_path / "out", 0
    while not out.exists():
        dying(applied(base, out, resume=runs > 0), 45)
        runs += 1
        assert runs < 60, "every run must finish at least one file"
    assert runs >= 3 and contents(out) == expected and contents(revert(out)) == contents(base)


def test_a_killed_revert_leaves_no_half_checkpoint(base: Path, tmp_path: Path) -> None:
    done = patch().plan(base).apply(tmp_path / "done")
    for after in (5, 40, 80):
        out = tmp_path / f"back{after}"
        if dying(lambda out=out: revert(done, out), after):  # type: ignore[misc]
            assert not out.exists()
            if partial_name(out).exists():
                with pytest.raises(SteerError, match="did not finish"):
                    revert(done, out)
                shutil.rmtree(partial_name(out))
        else:
            shutil.rmtree(out)
        assert contents(revert(done, out)) == contents(base)


def test_a_changed_base_is_not_mixed_into_a_partial_output(base: Path, tmp_path: Path) -> None:
    assert dying(applied(base, tmp_path / "out"), 40)
    os.utime(base / "config.json", ns=(0, 0))
    with pytest.raises(SteerError, match="files"):
        patch().plan(base).apply(tmp_path / "out", resume=True, keep_undo=True)


@pytest.fixture
def file_limit() -> Callable[[int], None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_large_files_is_one_paragraph(
    base: Path, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    """The kernel itself says no in the middle of a shard; with room again the same command finishes."""
    made = patch().plan(base)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        file_limit(20_000)
        with pytest.raises(SteerError, match="resume") as caught:
            made.apply(tmp_path / "out")
    finally:
        file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    done = made.apply(tmp_path / "out", resume=True)
    assert contents(done.path) == contents(made.apply(tmp_path / "undisturbed").path)


def test_a_full_disk_during_an_edited_tensor(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pwrite, left = patch().plan(base), os.pwrite, [3000]

    def full(descriptor: int, data: bytes, place: int) -> int:
        count = min(len(data), left[0])
        if count == 0:
            raise OSError(28, "No space left on device")
        left[0] -= count
        return pwrite(descriptor, data[:count], place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SteerError, match="No space"):
        made.apply(tmp_path / "out")
    monkeypatch.undo()
    assert contents(made.apply(tmp_path / "out", resume=True).path) == contents(
        made.apply(tmp_path / "undisturbed").path
    )


def test_an_unwritable_place_leaves_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    before = contents(tmp_path)
    for out in (tmp_path / "file" / "out", Path("/proc/out"), Path("/dev/null/out")):
        with pytest.raises(SteerError):
            patch().plan(base).apply(out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["truncated", "longer"])
def test_a_damaged_base_is_refused_before_anything_is_written(base: Path, tmp_path: Path, damage: str) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-5] if damage == "truncated" else data + b"x")
    with pytest.raises(SteerError, match=shard.name):
        patch().plan(base).apply(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_base_that_shrinks_while_it_is_read_is_an_error(base: Path, tmp_path: Path) -> None:
    made = patch().plan(base)
    shard = base / made.touched[0].entry.file
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(SteerError, match="ends at byte"):
        made.apply(tmp_path / "out")
    assert not (tmp_path / "out").exists()
