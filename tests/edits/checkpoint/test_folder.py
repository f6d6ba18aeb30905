"""A folder is whole, or partial and can be finished to the same bytes, or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from edits.checkpoint import folder as module
from edits.checkpoint.folder import JOURNAL, FileTask, FolderPlan, Progress, partial_name, write_folder
from edits.checkpoint.stream import Json, write_all
from steer.errors import SteerError
from tests.edits.material import contents

FILES = {"a.bin": b"a" * 1000, "b/c.bin": b"c" * 10, "empty": b"", "z.txt": b"last"}


class StopError(Exception):
    """Stands for a kill: the process goes no further."""


def planned(
    made: list[str] | None = None, fail: str = "", error: type[BaseException] | OSError = StopError, key: object = 1
) -> FolderPlan:
    """Tasks that write FILES; the task named `fail` writes half of its bytes and raises."""

    def task(name: str, data: bytes) -> FileTask:
        def write(target: int, progress: Progress) -> Json:
            if name == fail:
                write_all(target, data[: len(data) // 2], 0)
                raise error
            if made is not None:
                made.append(name)
            write_all(target, data, 0)
            progress(len(data))
            return {"first": data[:1].decode()}

        return FileTask(name, len(data), write, lambda path, record: path.read_bytes()[:1].decode() == record["first"])

    def seal(partial: Path, records: Mapping[str, Json]) -> None:
        (partial / "steer" / "sealed.json").write_text(json.dumps({name: records[name] for name in sorted(records)}))

    tasks = [task(name, data) for name, data in FILES.items()]
    return FolderPlan(tasks, {"key": key}, seal, lambda partial: (partial / "steer" / "sealed.json").exists())


def expected(tmp_path: Path) -> dict[str, bytes]:
    return contents(write_folder(tmp_path / "undisturbed", planned()))


def test_writes_every_file_with_mode_0644_and_counts_bytes(tmp_path: Path) -> None:
    old, counted = os.umask(0o077), []
    try:
        out = write_folder(tmp_path / "new" / "out", planned(), progress=counted.append)
    finally:
        os.umask(old)
    found = contents(out)
    sealed = found.pop("steer/sealed.json")
    assert found == FILES and set(json.loads(sealed)) == set(FILES)
    assert {oct((out / name).stat().st_mode & 0o777) for name in FILES} == {"0o644"}
    assert sum(counted) == sum(map(len, FILES.values()))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


@pytest.mark.parametrize("name", list(FILES))
def test_a_stopped_run_leaves_a_partial_folder_that_resumes_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    out, made = tmp_path / "out", []
    with pytest.raises(StopError):
        write_folder(out, planned(made, fail=name))
    assert not out.exists() and partial_name(out).is_dir()
    first = len(made)
    counted: list[int] = []
    write_folder(out, planned(made), resume=True, progress=counted.append)
    assert contents(out) == expected(tmp_path) and not partial_name(out).exists()
    assert len(made) == len(FILES) and len(set(made)) == len(FILES), f"{first} finished files were not made again"
    assert sum(counted) == sum(map(len, FILES.values()))


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    for damage in (b"b" * 1000, b"short"):
        out, made = tmp_path / f"out{len(damage)}", []
        with pytest.raises(StopError):
            write_folder(out, planned(made, fail="z.txt"))
        (partial_name(out) / "a.bin").write_bytes(damage)
        write_folder(out, planned(made), resume=True)
        assert made.count("a.bin") == 2 and contents(out) == expected(tmp_path / str(len(damage)))


def test_a_torn_last_line_of_the_journal_costs_one_file(tmp_path: Path) -> None:
    out, made = tmp_path / "out", []
    with pytest.raises(StopError):
        write_folder(out, planned(made, fail="empty"))
    journal = partial_name(out) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-9] + "é".encode()[:1])
    write_folder(out, planned(made), resume=True)
    assert made == ["a.bin", "b/c.bin", "b/c.bin", "empty", "z.txt"] and contents(out) == expected(tmp_path)


@pytest.mark.parametrize("when", ["before anything", "journal empty", "sealed"])
def test_the_narrow_moments_can_be_resumed_too(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    if when == "sealed":

        def stop(partial: Path, out: Path) -> None:
            raise StopError

        monkeypatch.setattr(module, "_publish", stop)
        with pytest.raises(StopError):
            write_folder(out, planned())
        monkeypatch.undo()
    else:
        (partial_name(out) / "steer").mkdir(parents=True)
        if when == "journal empty":
            (partial_name(out) / JOURNAL).touch()
    write_folder(out, planned(), resume=True)
    assert contents(out) == expected(tmp_path)


def test_what_is_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for place in (out, tmp_path / "dangling"):
        if place != out:
            place.symlink_to(tmp_path / "nowhere")
        with pytest.raises(SteerError, match="exists"):
            write_folder(place, planned(), resume=True)
    out.rmdir()
    with pytest.raises(StopError):
        write_folder(out, planned(fail="z.txt"))
    before = contents(partial_name(out))
    with pytest.raises(SteerError, match="did not finish"):
        write_folder(out, planned())
    with pytest.raises(SteerError, match="something else"):
        write_folder(out, planned(key=2), resume=True)
    assert contents(partial_name(out)) == before


def test_a_partial_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    partial = partial_name(tmp_path / "out")
    partial.mkdir()
    (partial / "thesis.txt").write_text("keep")
    with pytest.raises(SteerError, match="journal"):
        write_folder(tmp_path / "out", planned(), resume=True)
    assert contents(partial) == {"thesis.txt": b"keep"}


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def intrude(target: int, progress: Progress) -> Json:
        with pytest.raises(SteerError, match="nother process"):
            write_folder(out, planned(key="same"), resume=True)
        return {}

    first = FileTask("x", 0, intrude, lambda path, record: True)
    write_folder(
        out,
        FolderPlan([first, *planned().tasks], {"key": "same"}, lambda partial, records: None, lambda partial: False),
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_refusing_disk_is_one_paragraph_and_can_be_resumed(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(SteerError, match="resume") as caught:
        write_folder(out, planned(fail="b/c.bin", error=OSError(number, os.strerror(number))))
    assert os.strerror(number) in str(caught.value) and not out.exists()
    write_folder(out, planned(), resume=True)
    assert contents(out) == expected(tmp_path)


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out"])
def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SteerError, match="failed"):
        write_folder(tmp_path / place, planned())
    assert contents(tmp_path) == {"file": b"in the way"}


def test_too_little_room_is_said_before_the_first_byte(tmp_path: Path) -> None:
    huge = FileTask("huge", 1 << 60, lambda target, progress: {}, lambda path, record: True)
    with pytest.raises(SteerError, match="GB free"):
        write_folder(tmp_path / "out", FolderPlan([huge], {}, lambda partial, records: None, lambda partial: False))
    assert list(tmp_path.iterdir()) == []


def linking(source: Path, written: list[str]) -> FolderPlan:
    def write(target: int, progress: Progress) -> Json:
        written.append("copied")
        write_all(target, source.read_bytes(), 0)
        return {}

    task = FileTask("x", source.stat().st_size, write, lambda path, record: True, link=source)
    return FolderPlan([task], {}, lambda partial, records: None, lambda partial: False)


def test_links_go_to_the_file_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "blob").chmod(0o600)
    (tmp_path / "name").symlink_to("blob")
    written: list[str] = []
    out = write_folder(tmp_path / "out", linking(tmp_path / "name", written))
    assert (out / "x").samefile(tmp_path / "blob") and not (out / "x").is_symlink() and not written
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o600, "the shared file keeps its mode"


def test_a_link_that_is_not_possible_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "blob").write_bytes(b"data")
    written: list[str] = []
    out = write_folder(tmp_path / "out", linking(tmp_path / "blob", written))
    assert written == ["copied"] and contents(out) == {"x": b"data"} and (out / "x").stat().st_nlink == 1


def test_names_are_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order on disk: every file, then every folder, then the new name, then the parent."""
    events: list[str] = []
    fsync: Callable[[int], None] = os.fsync

    def noted(descriptor: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_folder(tmp_path / "out", planned())
    partial = str(tmp_path / "out.partial")
    assert events[: len(FILES)] == [f"{partial}/{name}.writing" for name in FILES]
    assert events[-1] == str(tmp_path) and events[-2] == partial
    assert set(events[len(FILES) : -1]) == {partial, f"{partial}/b", f"{partial}/steer"}


def pieces(name: str) -> FolderPlan:
    """One file of ten bytes, written one by one."""

    def write(target: int, progress: Progress) -> Json:
        for at in range(10):
            write_all(target, b"x", at)
            progress(1)
        return {}

    task = FileTask(name, 10, write, lambda path, record: True)
    return FolderPlan([task], {}, lambda partial, records: None, lambda partial: False)


def flushes_at_once(monkeypatch: pytest.MonkeyPatch, meets: Callable[[int, int], None]) -> list[int]:
    """Have files flushed by every fourth byte, before the next is written; return their sizes at each flush."""
    sizes: list[int] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            sizes.append(os.fstat(descriptor).st_size)
            meets(descriptor, len(sizes))

    class Thread(ThreadPoolExecutor):
        def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
            done = super().submit(work, *arguments, **named)
            done.exception()
            return done

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "ThreadPoolExecutor", Thread)
    monkeypatch.setattr(module, "BEHIND", 4)
    return sizes


def test_a_long_file_is_flushed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    sizes = flushes_at_once(monkeypatch, lambda descriptor, number: None)
    counted: list[int] = []
    out = write_folder(tmp_path / "out", pieces("long"), progress=counted.append)
    assert sizes == [4, 8, 10] and sum(counted) == 10 and contents(out) == {"long": b"x" * 10}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_any_flush_meets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The kernel tells of a failed write-back once; the flush after it succeeds and has nothing on the disk."""

    def meets(descriptor: int, count: int) -> None:
        if count == number:
            raise OSError(errno.EIO, "Input/output error")

    flushes_at_once(monkeypatch, meets)
    with pytest.raises(SteerError, match="Input/output"):
        write_folder(tmp_path / "out", pieces("long"))
    assert not (tmp_path / "out").exists() and not (partial_name(tmp_path / "out") / "long").exists()
    monkeypatch.undo()
    assert contents(write_folder(tmp_path / "out", pieces("long"), resume=True)) == {"long": b"x" * 10}


def test_half_a_file_of_a_killed_run_is_not_laid_over_a_link(tmp_path: Path) -> None:
    """A run that copied was killed in the middle of a file; the one that goes on links it instead."""
    (tmp_path / "blob").write_bytes(b"all of it")
    plan, written = linking(tmp_path / "blob", []), 0
    partial = partial_name(tmp_path / "out")
    (partial / "steer").mkdir(parents=True)
    (partial / JOURNAL).write_text("{}\n")
    (partial / "x.writing").write_bytes(b"all")
    out = write_folder(tmp_path / "out", plan, resume=True)
    assert contents(out) == {"x": b"all of it"} and (out / "x").samefile(tmp_path / "blob") and not written


@pytest.mark.parametrize("letter", ["\u2028", "\u0085", "\n", "é", '"'])
def test_names_of_any_letters_are_resumed(tmp_path: Path, letter: str) -> None:
    """JSON leaves some letters as they are at which Python ends a line."""
    name, made = f"a{letter}b", list[str]()

    def task(name: str, fail: bool) -> FileTask:
        def write(target: int, progress: Progress) -> Json:
            if fail:
                raise StopError
            made.append(name)
            return {"name": name}

        return FileTask(name, 0, write, lambda path, record: record == {"name": name})

    def plan(fail: bool) -> FolderPlan:
        key = {"files": {name: 1}}
        return FolderPlan([task(name, False), task("z", fail)], key, lambda partial, records: None, lambda p: False)

    with pytest.raises(StopError):
        write_folder(tmp_path / "out", plan(True))
    write_folder(tmp_path / "out", plan(False), resume=True)
    assert made == [name, "z"] and set(contents(tmp_path / "out")) == {name, "z"}


@pytest.mark.parametrize("text", ["[1]\n", "nonsense\n", "{}\n{}\n", "{}\n[]\n", "\udcff\n"])
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    partial = partial_name(tmp_path / "out")
    (partial / "steer").mkdir(parents=True)
    (partial / JOURNAL).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SteerError, match=r"damaged|something else"):
        write_folder(tmp_path / "out", planned(), resume=True)


def test_who_resumes_while_another_finishes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the folder has its name it is locked: a second run would sweep away what the first has sealed."""
    unlink, refused = Path.unlink, list[Path]()

    def late(path: Path, missing_ok: bool = False) -> None:
        if path.name == "journal.jsonl" and not refused:
            refused.append(path)
            with pytest.raises(SteerError, match="nother process"):
                write_folder(tmp_path / "out", planned(), resume=True)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    write_folder(tmp_path / "out", planned())
    monkeypatch.undo()
    assert refused and contents(tmp_path / "out") == expected(tmp_path)


def test_a_journal_whose_run_has_just_finished_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StopError):
        write_folder(tmp_path / "out", planned(fail="z.txt"))
    lock, left = fcntl.flock, partial_name(tmp_path / "out")

    def finished(file: object, how: int) -> None:
        left.rename(tmp_path / "out")
        (tmp_path / "out" / JOURNAL).unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", finished)
    with pytest.raises(SteerError, match="nother process"):
        write_folder(tmp_path / "out", planned(), resume=True)
    assert not left.exists()


def test_half_a_file_does_not_count_against_the_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for the folder once, as it is after a kill near the end of a large file."""
    with pytest.raises(StopError):
        write_folder(tmp_path / "out", planned(fail="a.bin"))
    size = sum(map(len, FILES.values()))

    def usage(path: Path) -> object:
        taken = sum(file.stat().st_size for file in partial_name(tmp_path / "out").rglob("*.writing"))
        return type("Usage", (), {"free": size - taken})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    write_folder(tmp_path / "out", planned(), resume=True)
    assert contents(tmp_path / "out") == expected(tmp_path)


def test_links_that_cannot_be_made_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    plan, memory = linking(tmp_path / "blob", []), Path("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3}))
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with TemporaryDirectory(dir=memory) as elsewhere:
        with pytest.raises(SteerError, match="GB free"):
            write_folder(Path(elsewhere) / "out", plan)
        assert not list(Path(elsewhere).iterdir())
    assert contents(write_folder(tmp_path / "out", plan)) == {"x": b"data"}


def test_a_finished_file_in_whose_place_lies_a_link_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        write_folder(tmp_path / "out", planned(fail="z.txt"))
    file = partial_name(tmp_path / "out") / "a.bin"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    out = write_folder(tmp_path / "out", planned(), resume=True)
    assert not (out / "a.bin").is_symlink() and (tmp_path / "elsewhere").read_bytes() == FILES["a.bin"]


def test_the_folder_one_stands_in_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path(".."), Path("/")):
        with pytest.raises(SteerError, match="exists"):
            module.refuse_occupied(out, resume=True)
    write_folder(Path("x"), planned())
    assert contents(tmp_path / "x") == expected(tmp_path / "other")
