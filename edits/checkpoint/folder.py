"""A folder that is either whole or called `OUT.partial`.

Files are finished one after the other: written under a temporary name, flushed to the disk, renamed, then noted in a
journal. Only when all are there is the folder renamed to `OUT`. A run that was killed, or met a full disk, leaves
`OUT.partial`; resuming checks the finished files against the journal, skips them, and ends with the same bytes.

One thread flushes what is there of a file while the rest and the next one are written, so that the disk is busy all the
time (four files of 512 MB: .6 of the time of copying and flushing in turn) and the last flush finds little (of files of
1 GB: .05 s of .4). It is never more than one file behind, and what it meets is raised in the writer. A temporary file is
always new (O_EXCL) and a link in its place is refused, so nothing that exists is ever opened for writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from edits.checkpoint.stream import Json
from steer.errors import SteerError
from steer.files import MODE
from steer.identity import canonical

OURS = "steer"
JOURNAL = f"{OURS}/journal.jsonl"
BEHIND = 1 << 27
"""Bytes of a file that are written before the thread is asked to flush them."""
Progress = Callable[[int], None]
Flushes = list[Future[None]]


@dataclass(frozen=True)
class FileTask:
    """One file to make.

    Attributes:
        name: path in the folder, parts joined by "/".
        size: bytes that it will have.
        write: fills the open descriptor, tells the progress how many bytes it wrote, returns what to record.
        intact: whether a finished file still is what its record says; its size has been checked.
        link: this file may be hard-linked instead, where the file system can; it is never opened for writing.
        linked: what to record then.
    """

    name: str
    size: int
    write: Callable[[int, Progress], Json]
    intact: Callable[[Path, Json], bool]
    link: Path | None = None
    linked: Callable[[], Json] = field(default=lambda: {"linked": True})


@dataclass(frozen=True)
class FolderPlan:
    """What a folder will hold.

    Attributes:
        tasks: its files.
        key: what the bytes depend on; a partial folder with another key is not resumed.
        seal: writes the last files into the partial folder, given the record of every task.
        sealed: whether a partial folder without a journal is one that only waits for its name.
    """

    tasks: Sequence[FileTask]
    key: Json
    seal: Callable[[Path, Mapping[str, Json]], None]
    sealed: Callable[[Path], bool]


def partial_name(out: Path) -> Path:
    """Return the name under which `out` is built."""
    return out.with_name(out.name + ".partial")


def write_folder(out: Path, plan: FolderPlan, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Make the folder `out`, or finish one that was begun.

    Args:
        out: must not exist.
        plan: what it will hold.
        resume: go on with `out.partial` if it is there.
        progress: called with numbers of bytes, of finished files too; they add up to the sizes of all tasks.

    Raises:
        SteerError: `out` exists; a partial folder is there and `resume` is false, or was made by another plan, or is
            being written; there is too little space; a file could not be written (the partial folder stays).
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that has the name of the output
    partial = partial_name(out)
    refuse_occupied(out, resume)
    report = progress or (lambda count: None)
    with _written(partial, resume):
        if resume and partial.is_dir() and not (partial / JOURNAL).exists() and plan.sealed(partial):
            report(sum(task.size for task in plan.tasks))
            _publish(partial, out)
        else:
            _fill(partial, out, plan, report)
    return out


def refuse_occupied(out: Path, resume: bool) -> None:
    """Refuse an output name that is taken.

    Raises:
        SteerError: `out` exists, or `out.partial` does and `resume` is false.
    """
    if os.path.lexists(out):
        raise SteerError(f"the output {out} exists already", "a name that is free", "Choose another name or remove it")
    partial = partial_name(out)
    if os.path.lexists(partial) and not resume:
        raise SteerError(
            f"{partial} is left from a run that did not finish",
            "no partial output",
            "Finish it with --resume (resume=True), or remove it",
        )


@contextmanager
def _written(partial: Path, resume: bool) -> Iterator[None]:
    """Say in one paragraph what the disk refused, and that the partial folder can be finished."""
    try:
        yield
    except OSError as error:
        kept = (
            f"What was finished stays in {partial}; put this right and run the same command with --resume"
            if partial.is_dir()
            else "Choose a folder that can be written"
        )
        raise SteerError(
            f"writing {error.filename or partial} failed: {error.strerror or error}",
            "a disk with room that may be written",
            kept,
        ) from error


def _fill(partial: Path, out: Path, plan: FolderPlan, progress: Progress) -> None:
    if partial.is_symlink() or (partial / OURS).is_symlink() or (partial / JOURNAL).is_symlink():
        raise _linked_away(partial)
    new = not any(path.is_file() for path in partial.rglob("*"))
    if new:
        _check_room(partial, plan.tasks)
        (partial / OURS).mkdir(parents=True, exist_ok=True)
    with _journal(partial / JOURNAL, plan.key, new) as (journal, records):
        left = [task for task in plan.tasks if not _finished(partial / task.name, task, records)]
        if not new:
            for task in left:  # Half a file of a killed run takes room too.
                _cleared(partial, partial / task.name)
            _check_room(partial, left)
        waiting = {task.name for task in left}
        progress(sum(task.size for task in plan.tasks if task.name not in waiting))
        with ThreadPoolExecutor(1) as flusher, _finishing(journal, records) as finish:
            for task in left:
                finish(task.name, *_make(partial, task, progress, flusher))
        _sweep(partial, {JOURNAL, *(task.name for task in plan.tasks)})
        plan.seal(partial, records)
        (partial / JOURNAL).unlink()
        _publish(partial, out)  # Still locked, so that nobody who resumes takes it for unfinished.


def _finished(path: Path, task: FileTask, records: Mapping[str, Json]) -> bool:
    """Whether an earlier run made this file and it is as it was."""
    record = records.get(task.name)
    found = record is not None and path.is_file() and not path.is_symlink() and path.stat().st_size == task.size
    return found and task.intact(path, records[task.name])


Finish = Callable[[str, Path, Flushes, Json], None]


@contextmanager
def _finishing(journal: IO[str], records: dict[str, Json]) -> Iterator[Finish]:
    """Yield what takes a file to its name and into the journal once it is flushed, while the next one is written.

    However the block ends, the file that waits is finished first, so a run that is resumed need not make it again.
    """
    waiting: list[tuple[str, Path, Flushes, Json]] = []

    def settle() -> None:
        while waiting:
            name, path, flushes, record = waiting.pop()
            for flushed in flushes:  # All of them: the kernel tells of an error once.
                flushed.result()
            temporary = _temporary(path)
            if temporary.exists():
                temporary.replace(path)
            records[name] = record
            journal.write(canonical({"file": name, "record": record}) + "\n")
            journal.flush()

    def finish(name: str, path: Path, flushes: Flushes, record: Json) -> None:
        settle()
        waiting.append((name, path, flushes, record))

    try:
        yield finish
    finally:
        settle()


def _flush(target: int) -> None:
    try:
        os.fsync(target)
    finally:
        os.close(target)


def _flushing(target: int, progress: Progress, flusher: Executor, flushes: Flushes) -> Progress:
    """Return a progress that has the file flushed on the way, unless the flusher is still at it."""
    written = 0

    def told(count: int) -> None:
        nonlocal written
        progress(count)
        written += count
        if written >= BEHIND and (not flushes or flushes[-1].done()):
            written = 0
            flushes.append(flusher.submit(_flush, os.dup(target)))

    return told


def _sweep(partial: Path, names: set[str]) -> None:
    """Remove what a killed run left under temporary names."""
    for path in partial.rglob("*"):
        if path.is_file() and path.relative_to(partial).as_posix() not in names:
            path.unlink()


def _check_room(partial: Path, tasks: Sequence[FileTask]) -> None:
    parent = next(folder for folder in partial.parents if folder.exists())
    device, free = parent.stat().st_dev, shutil.disk_usage(parent).free
    needed = sum(task.size for task in tasks if task.link is None or task.link.stat().st_dev != device)
    if needed > free:
        raise SteerError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are to be written",
            "room for the whole folder",
            "Free some space, write to another disk, or share untouched files with --link",
        )


@contextmanager
def _journal(path: Path, key: Json, new: bool) -> Iterator[tuple[IO[str], dict[str, Json]]]:
    """Open the journal of a partial folder for this process alone, with the records that it holds."""
    if not new and not path.exists():
        raise SteerError(
            f"{path.parent.parent} has no journal, so nobody knows what is finished in it",
            "a partial output of ours",
            "Remove the folder and start again",
        )
    with path.open("a+", encoding="utf-8", errors="surrogateescape") as journal:
        busy = SteerError(
            f"another process is writing {path.parent.parent}", "one writer", "Wait until it has finished"
        )
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not os.fstat(journal.fileno()).st_nlink:  # It finished after the journal was opened here.
            raise busy
        stored, records = _read_journal(journal, path)
        if stored is None:
            journal.write(canonical(key) + "\n")
            journal.flush()
        elif stored != json.loads(canonical(key)):
            differing = ", ".join(sorted(name for name in {*stored, *key} if stored.get(name) != key.get(name)))
            raise SteerError(
                f"{path.parent.parent} was begun with something else (it differs in: {differing})",
                "the same patch and the same base",
                "Remove it and start again",
            )
        yield journal, records


def _read_journal(journal: IO[str], path: Path) -> tuple[Json | None, dict[str, Json]]:
    """Return the key and the records of a journal, and cut off a last line that is not whole."""
    journal.seek(0)
    try:
        text = journal.read()
        text = text[: text.rfind("\n") + 1]
        found = [json.loads(line) for line in text.split("\n")[:-1]]  # Names may hold what splitlines() would split at.
        key, records = dict(*found[:1]), {entry["file"]: entry["record"] for entry in found[1:]}
        journal.truncate(len(text.encode()))
    except (ValueError, KeyError, TypeError) as error:
        raise SteerError(
            f"{path} is damaged", "the journal that was written", "Remove the folder and start again"
        ) from error
    return (key if found else None), records


def _make(partial: Path, task: FileTask, progress: Progress, flusher: Executor) -> tuple[Path, Flushes, Json]:
    """Write one file under its temporary name; return its path, what flushes it (nothing does a link), its record."""
    path = partial / task.name
    temporary = _cleared(partial, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flushes: Flushes = []
    if task.link is not None and _linked(task.link, path):
        progress(task.size)
        return path, flushes, task.linked()
    target = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
    with ExitStack() as closing:
        closing.callback(os.close, target)
        record = task.write(target, _flushing(target, progress, flusher, flushes))
        os.fchmod(target, MODE)
        closing.pop_all()  # It is whole: whoever flushes it closes it.
    flushes.append(flusher.submit(_flush, target))
    return path, flushes, record


def _cleared(partial: Path, path: Path) -> Path:
    """Return the temporary name of a file, free of what a killed run left under it."""
    if not path.parent.resolve().is_relative_to(partial.resolve()):
        raise _linked_away(path.parent)
    temporary = _temporary(path)
    if temporary.is_symlink():
        raise _linked_away(temporary)
    temporary.unlink(missing_ok=True)
    return temporary


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _linked_away(path: Path) -> SteerError:
    return SteerError(
        f"{path} is a symbolic link to somewhere else",
        "a partial output that lies where it seems to lie",
        "Nothing is written through links: remove it and start again",
    )


def _linked(source: Path, path: Path) -> bool:
    """Link to the file itself, since a hub cache is made of symbolic links; say whether that was possible."""
    path.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:
        return False
    return True


def _publish(partial: Path, out: Path) -> None:
    if not any((partial / OURS).iterdir()):
        (partial / OURS).rmdir()
    for folder, _, _ in os.walk(partial, topdown=False):
        sync_folder(Path(folder))
    partial.rename(out)
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
