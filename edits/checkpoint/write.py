"""The writer of checkpoints: tensors that are kept or made, and files that are carried over, into a new folder.

Whoever changes a checkpoint says what the result holds, as `OutTensor`s, and how to make the bytes of those that
change; whatever has no tensor of the result in it is carried over. A shard whose header stays as it is (same names,
dtypes and shapes) keeps the header's bytes and the order behind it, and differs from its source in the made tensors
alone. Any other gets a new header, wider dtypes first so that every tensor is aligned. In both, kept tensors go by
kernel copy, neighbours in one call, and made ones piece by piece, so no tensor need fit in memory. Where every byte lies
is known before the first is written, so tensors may be made several at once. The index is written anew where names, files
or sizes changed. See `folder` for what a kill leaves behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from threading import Event, Lock
from typing import Any

from edits.checkpoint.folder import FileTask, FolderPlan, Progress, write_folder
from edits.checkpoint.source import SourceFile
from edits.checkpoint.stream import STEP, Bytes, Json, copy_range, read_exactly, safetensors_header, seen, write_all
from steer.anatomy.headers import BYTES, INDEX, SINGLE, Entry, read_file_header
from steer.errors import SteerError


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the result; exactly one of `kept` and `make` is given.

    Attributes:
        name: on disk.
        dtype: the word of the format, such as "BF16".
        shape: as stored.
        file: plain name of the shard that it goes into.
        kept: where its bytes lie; the kernel copies them.
        make: makes its bytes, in order; a piece is done with before the next one is asked for.
        record: what to note in the journal once `make` is through. A hash of the bytes under `after` (`sha256:…`)
            is checked when a run is resumed; a tensor without it is made again then.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    kept: tuple[Path, Entry] | None = None
    make: Callable[[], Iterator[Bytes]] | None = None
    record: Callable[[], Json] = field(default=dict)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.kept[1].end - self.kept[1].start if self.kept else math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Copied:
    """Bytes `start` to `end` of a file, as they are."""

    path: Path
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


Part = bytes | Copied | OutTensor


def write_checkpoint(
    out: Path,
    tensors: Sequence[OutTensor],
    files: Sequence[SourceFile],
    *,
    key: Json,
    seal: Callable[[Path, Mapping[str, Json]], None],
    sealed: Callable[[Path], bool],
    texts: Mapping[str, str] | None = None,
    extra: Sequence[FileTask] = (),
    resume: bool = False,
    link: bool = False,
    hash_all: bool = False,
    makers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint into the new folder `out`, or finish one that was begun.

    Args:
        out: must not exist, nor lie inside a folder that files come from.
        tensors: all of the result.
        files: of the source, shards and index among them; those that hold no tensor of the result are carried over.
        key: what the bytes depend on; a partial folder with another key is not resumed.
        seal: writes the last small files, given the record of every file. A shard's holds `tensors`: name -> what its
            `record` returned; with `hash_all` every file's holds `sha256`.
        sealed: whether a partial folder without a journal is one that only waits for its name.
        texts: small files to write, in place of those of the source.
        extra: more files, such as an undo.
        resume: go on with `out.partial`; finished files are checked and skipped.
        link: share files that stay with the source by hard links, where the file system can.
        hash_all: hash every file while it is written; kept bytes then pass through this process.
        makers: threads that make tensors, each another one; not with `hash_all`, which takes the bytes in order.
        progress: called with numbers of bytes, by one thread at a time; they add up to the size of the result.

    Raises:
        SteerError: the output exists or lies inside a source; a partial folder is in the way, or was begun with another
            key; two tensors share a name; a name of a shard is no plain one; a source ends early; the disk refuses.
    """
    refuse_inside(out, {_root(file) for file in files})
    tasks = checkpoint_tasks(tensors, files, texts or {}, link=link, hash_all=hash_all, makers=makers)
    plan = FolderPlan([*extra, *tasks], key, seal, sealed)
    return write_folder(out, plan, resume=resume, progress=progress)


def checkpoint_tasks(
    tensors: Sequence[OutTensor],
    files: Sequence[SourceFile],
    texts: Mapping[str, str],
    *,
    link: bool = False,
    hash_all: bool = False,
    makers: int = 1,
) -> list[FileTask]:
    """Return how to make each file of a checkpoint; arguments and errors as `write_checkpoint`."""
    _check(tensors)
    shards: dict[str, list[OutTensor]] = {}
    for tensor in tensors:
        shards.setdefault(tensor.file, []).append(tensor)
    sources = {file.name: file for file in files}
    index = index_text(tensors, sources)
    texts = {**({INDEX: index} if index is not None else {}), **texts}
    tasks = []
    for file in files:
        if file.target not in texts and file.name not in shards:
            parts: list[Part] = [Copied(file.path, 0, file.size)]
            tasks.append(parts_task(file.target, parts, file.path if link else None, hash_all))
    for name, held in shards.items():
        source = sources.get(name)
        parts = shard_parts(held, source)
        whole = source is not None and parts == [Copied(source.path, 0, source.size)]
        linked = source.path if link and source is not None and whole else None
        tasks.append(parts_task(name, parts, linked, hash_all, makers))
    tasks += [parts_task(name, [text.encode()], None, hash_all) for name, text in texts.items()]
    return sorted(tasks, key=lambda task: task.name)


def shard_parts(tensors: Sequence[OutTensor], source: SourceFile | None) -> list[Part]:
    """Return the parts of a shard in order: its header, then every tensor.

    Args:
        tensors: all that it will hold.
        source: the shard of that name in the source; its header, order and metadata are kept where they can be.
    """
    entries = read_file_header(source.path) if source is not None else {}
    named = {tensor.name: tensor for tensor in tensors}
    parts: list[Part]
    if source is not None and _described(entries) == {t.name: (t.dtype, t.shape) for t in tensors}:
        begin = min((entry.start for entry in entries.values()), default=source.size)
        ordered = [named[name] for name in sorted(entries, key=lambda name: (entries[name].start, entries[name].end))]
        parts = [Copied(source.path, 0, begin)]
    else:
        ordered = sorted(tensors, key=lambda tensor: -BYTES.get(tensor.dtype, 1))
        metadata = metadata_of(source.path) if source is not None else {"format": "pt"}
        parts = [safetensors_header({t.name: (t.dtype, t.shape, t.size) for t in ordered}, metadata)]
    for tensor in ordered:
        part = tensor if tensor.kept is None else Copied(tensor.kept[0], tensor.kept[1].start, tensor.kept[1].end)
        last = parts[-1]
        if isinstance(part, Copied) and isinstance(last, Copied) and (last.path, last.end) == (part.path, part.start):
            parts[-1] = Copied(part.path, last.start, part.end)
        else:
            parts.append(part)
    return parts


def _described(entries: Mapping[str, Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


def metadata_of(path: Path) -> dict[str, str] | None:
    """Return the `__metadata__` of a safetensors file whose header has been checked."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__")
    return {key: text for key, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else None


def index_text(tensors: Sequence[OutTensor], sources: Mapping[str, SourceFile]) -> str | None:
    """Return the index that the result needs, or None where the source's own, or none, is right."""
    shards = {tensor.file for tensor in tensors}
    if shards <= {SINGLE}:
        return None
    table = {tensor.name: tensor.file for tensor in tensors}
    sizes = {tensor.name: tensor.size for tensor in tensors}
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    old = json.loads(sources[INDEX].path.read_bytes()) if INDEX in sources else {}
    before = {
        name: entry
        for file in set(old.get("weight_map", {}).values()) & set(sources)
        for name, entry in read_file_header(sources[file].path).items()
    }
    # Not the index's own table: it may leave tensors of its shards out.
    if (
        before
        and {n: e.file for n, e in before.items()} == table
        and {n: e.end - e.start for n, e in before.items()} == sizes
    ):
        return None
    stored = old.get("metadata")
    metadata = {**(stored if isinstance(stored, dict) else {}), "total_size": sum(sizes.values())}
    if isinstance(metadata.get("total_parameters"), int):
        # What counts as a parameter is the source's affair (a tied head counts once), so only the difference is added.
        metadata["total_parameters"] += numbers - sum(math.prod(entry.shape) for entry in before.values())
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(table.items()))}, indent=2) + "\n"


def _check(tensors: Sequence[OutTensor]) -> None:
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise SteerError(f"the result would hold {twice[0]!r} twice", "each tensor once")
    for tensor in tensors:
        if Path(tensor.file).name != tensor.file or not tensor.file.endswith(".safetensors"):
            raise SteerError(f"{tensor.name!r} would go into {tensor.file!r}", "the plain name of a safetensors file")
        if (tensor.kept is None) == (tensor.make is None):
            raise SteerError(f"{tensor.name!r} is both kept and made, or neither", "one of them")
        if tensor.kept is not None and (tensor.kept[1].dtype, tensor.kept[1].shape) != (tensor.dtype, tensor.shape):
            raise SteerError(
                f"{tensor.name!r} is kept from {tensor.kept[1].dtype} {list(tensor.kept[1].shape)}",
                f"{tensor.dtype} {list(tensor.shape)}, as it will be described",
            )


def refuse_inside(out: Path, roots: set[Path]) -> None:
    """Refuse an output that lies inside a source.

    Raises:
        SteerError: it does.
    """
    for root in roots:
        if out.resolve().is_relative_to(root.resolve()):
            raise SteerError(
                f"the output {out} lies inside {root}",
                "a folder outside of it",
                "A checkpoint is never changed in place",
            )


def _root(file: SourceFile) -> Path:
    return file.path.parents[file.name.count("/")]


def parts_task(
    name: str, parts: Sequence[Part], link: Path | None = None, hash_all: bool = False, makers: int = 1
) -> FileTask:
    """Return how to write a file of these parts.

    Args:
        name: path in the folder.
        parts: in order.
        link: what may be linked instead.
        hash_all: note the hash of the whole file.
        makers: as `write_checkpoint`.
    """
    size = sum(map(_size, parts))

    def write(target: int, progress: Progress) -> Json:
        if makers > 1 and not hash_all:
            return write_together(target, parts, progress, makers)
        return write_parts(target, parts, progress, hash_all)

    def intact(path: Path, record: Json) -> bool:
        if hash_all:
            return file_hash(path) == record.get("sha256")
        return _parts_intact(path, parts, record)

    def linked() -> Json:
        return {"linked": True} | ({"sha256": file_hash(link)} if hash_all and link is not None else {})

    return FileTask(name, size, write, intact, link, linked)


def write_parts(target: int, parts: Sequence[Part], progress: Progress, hashed: bool = False) -> Json:
    """Write parts one after the other into an empty file; return what to record.

    Raises:
        SteerError: a source ends early, or a tensor's pieces do not add up to its size.
    """
    position, records, digest = 0, {}, hashlib.sha256() if hashed else None
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        maker = stack.enter_context(ThreadPoolExecutor(1))
        begun: Iterator[Bytes] | None = None
        for part, coming in zip_longest(parts, parts[1:]):
            if isinstance(part, Copied):
                if part.path not in opened:
                    opened[part.path] = os.open(part.path, os.O_RDONLY)
                    stack.callback(os.close, opened[part.path])
                begun = _begun(maker, coming) if isinstance(coming, OutTensor) else None
                _copy(opened[part.path], target, part, position, digest, progress)
                position += part.size
                continue
            begin = position
            for piece in [part] if isinstance(part, bytes) else begun or _made(part):
                write_all(target, piece, position)
                if digest is not None:
                    digest.update(seen(piece))
                position += len(piece)
                progress(len(piece))
                del piece  # A piece may be as large as a matrix, and the next is made now.
            if isinstance(part, OutTensor):
                records[part.name] = _recorded(part, position - begin)
            begun = None
    found: Json = {"tensors": records} if records else {}
    return found | ({"sha256": digest.hexdigest()} if digest is not None else {})


def write_together(target: int, parts: Sequence[Part], progress: Progress, makers: int) -> Json:
    """Write parts into an empty file, each at its place, several tensors at once, large ones first; return what to record.

    Raises:
        SteerError: as `write_parts`; the first that a thread meets stops the others.
    """
    starts = accumulate(map(_size, parts), initial=0)
    placed = list(zip(parts, starts, strict=False))
    tensors = [(part, start) for part, start in placed if isinstance(part, OutTensor)]
    lock, stopped = Lock(), Event()

    def told(count: int) -> None:
        with lock:
            progress(count)

    def fill(tensor: OutTensor, begin: int) -> Json:
        position = begin
        for piece in _made(tensor):
            if stopped.is_set():
                return {}
            write_all(target, piece, position)
            position += len(piece)
            told(len(piece))
        return _recorded(tensor, position - begin)

    with ThreadPoolExecutor(makers) as pool:
        order = sorted(tensors, key=lambda placed: -placed[0].size)
        filling = {tensor.name: pool.submit(fill, tensor, start) for tensor, start in order}
        try:
            for part, start in placed:
                if isinstance(part, bytes):
                    write_all(target, part, start)
                    told(len(part))
                elif isinstance(part, Copied):
                    with part.path.open("rb") as source:
                        _copy(source.fileno(), target, part, start, None, told)
            for done in as_completed(filling.values()):
                done.result()
        finally:  # Where all went well nothing is left to stop.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    records = {tensor.name: filling[tensor.name].result() for tensor, _ in tensors}
    return {"tensors": records} if records else {}


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.size


def _recorded(tensor: OutTensor, count: int) -> Json:
    """Return what a tensor that was made notes, once its pieces are counted."""
    if count != tensor.size:
        raise SteerError(f"{tensor.name} was made with {count} bytes", f"{tensor.size} bytes")
    return tensor.record()


def _made(tensor: OutTensor) -> Iterator[Bytes]:
    if tensor.make is not None:
        yield from tensor.make()


def _begun(maker: ThreadPoolExecutor, tensor: OutTensor) -> Iterator[Bytes]:
    """Make a tensor's first piece in another thread, while the kernel copies what comes before it; return its pieces."""
    pieces = _made(tensor)
    first = [maker.submit(next, pieces, None)]  # Popped, since a future keeps its result alive.

    def made() -> Iterator[Bytes]:
        piece = first.pop().result()
        if piece is not None:
            yield piece
            del piece
            yield from pieces

    return made()


def _copy(source: int, target: int, part: Copied, position: int, digest: Any, progress: Progress) -> None:
    step = STEP if digest is None else 1 << 22
    for start in range(part.start, part.end, step):
        stop, at = min(start + step, part.end), position + start - part.start
        if digest is None:
            copy_range(source, target, start, stop, at)
        else:
            block = read_exactly(source, start, stop)
            digest.update(block.data)
            write_all(target, block, at)
        progress(stop - start)


def _parts_intact(path: Path, parts: Sequence[Part], record: Json) -> bool:
    """Whether what this process made is as it was; what the kernel copied is taken on its size."""
    position = 0
    for part in parts:
        size = _size(part)
        if not isinstance(part, Copied):
            made = (
                record.get("tensors", {}).get(part.name, {}).get("after")
                if isinstance(part, OutTensor)
                else hash_of(part)
            )
            if made is None or region_hash(path, position, position + size) != made:
                return False
        position += size
    return True


def hash_of(data: Bytes | bytes) -> str:
    """Return `sha256:…` of some bytes, as `steer.operations.tensor_hash` says it of a tensor."""
    return "sha256:" + hashlib.sha256(seen(data)).hexdigest()


def region_hash(path: Path, start: int, end: int) -> str:
    """Return `sha256:…` of some bytes of a file, read in steps."""
    digest, source = hashlib.sha256(), os.open(path, os.O_RDONLY)
    try:
        for position in range(start, end, 1 << 22):
            digest.update(read_exactly(source, position, min(position + (1 << 22), end)).data)
    finally:
        os.close(source)
    return "sha256:" + digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
