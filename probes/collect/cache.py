"""What recorders have read before, per recorder and shard, so that a second collection need not run the model.

    FOLDER/span_means-0123456789abcdef/key.json                  what it was made from, for the reader
    FOLDER/span_means-0123456789abcdef/00000-….safetensors       one shard of traces, whole or not there

An entry is found by everything that its numbers depend on: the weights and the configuration of the model, the changes
in force, the traces, the recorder with its options, layers, dtype, groups and the budget of a batch (which decides the
rounding), and the source of this program. The name of a shard's file hashes which traces it holds. The number of
threads and the machine are not in the key: they change the last bits.

Ours: weights are always hashed as they lie in memory, also where the checkpoint's hash is known, since somebody may
have written to them; only of weights that are not in memory the checkpoint's hash is taken. Nothing is ever removed
from the folder; all of it can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from probes.collect.cache_key import source_hash, versions
from probes.collect.job import Job
from probes.collect.recorders import Prepared
from probes.collect.store import naming_the_file
from steer import artifacts
from steer.errors import SteerError
from steer.files import write_text
from steer.identity import UNKNOWN, canonical, digest
from steer.shards import Shard


@dataclass(frozen=True, eq=False)
class Entry:
    """What one recorder of a job has in the cache.

    Attributes:
        name: of the recorder.
        folder: of the entry, which need not exist yet.
        key: everything that its numbers depend on.
        prepared: the recorder.
    """

    name: str
    folder: Path
    key: Mapping[str, Any]
    prepared: Prepared

    def path(self, shard: Shard) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{shard.name}.safetensors"

    def take(self, shard: Shard) -> dict[str, Tensor] | None:
        """Return the tensors of a shard; None where they are not there, or not as they were written."""
        try:
            kept = artifacts.read(self.path(shard), "summary")
        except SteerError:  # Not there, or damaged; then the model is run, and the file made again.
            return None
        story = (kept.provenance["options"], kept.provenance["content"])
        same = canonical(story) == canonical((self.key, {"shard": shard.name}))
        return kept.tensors if same and set(kept.tensors) == set(self.prepared.keeps) else None

    def put(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Keep a shard's tensors of this recorder, whole or not at all.

        Raises:
            OSError: the disk or the permissions refuse; names the file.
        """
        own = {name: tensors[name] for name in self.prepared.keeps}
        story = artifacts.provenance(options=self.key, content={"shard": shard.name})
        with naming_the_file(self.path(shard)):
            if not (self.folder / "key.json").is_file():
                write_text(self.folder / "key.json", canonical(self.key), overwrite=True)
            artifacts.write(self.path(shard), "summary", own, story, overwrite=True)


@dataclass(frozen=True, eq=False)
class Cache:
    """The cache as one job sees it.

    Attributes:
        folder: the whole cache's.
        entries: of those recorders of the job that can be kept.
        refused: why others, or all, cannot be.
    """

    folder: Path
    entries: tuple[Entry, ...] = ()
    refused: str | None = None

    def there(self, shards: Sequence[Shard]) -> tuple[tuple[str, int], ...]:
        """Return (recorder, how many of these shards have a file); none is read."""
        return tuple((entry.name, sum(entry.path(shard).is_file() for shard in shards)) for entry in self.entries)


def open_cache(folder: Path, job: Job) -> Cache:
    """Return the cache as the job sees it; nothing is written yet."""
    if UNKNOWN in job.reader.model.change_ids:
        return Cache(folder, (), "a change in force is a function, which has no fingerprint")
    model = job.reader.key()
    if model is None:
        return Cache(folder, (), "the weights are not in memory, and the hash of their files is not known")
    shared = {
        "model": model,
        "traces": job.plan.traces_hash,
        "layers": job.meta["layers"],
        "keep": job.options.keep,
        "dtype": job.options.dtype,
        "batch_tokens": job.options.batch_tokens,
        "groups": None if job.plan.groups is None else digest([canonical(job.plan.groups).encode()]),
        "versions": versions(),
    }
    entries, without = [], []
    for recorder, prepared in zip(job.recorders, job.prepared, strict=True):
        source = source_hash(type(recorder).__module__)
        if source is None:
            without.append(recorder.name)
            continue
        key = {**shared, "recorder": {"name": recorder.name, **recorder.options()}, "source": source}
        found = folder / f"{recorder.name}-{digest([canonical(key).encode()])[:16]}"
        entries.append(Entry(recorder.name, found, key, prepared))
    refused = f"{', '.join(without)} is not defined in a file, so it cannot be known again" if without else None
    return Cache(folder, tuple(entries), refused)
