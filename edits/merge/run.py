"""Write a merged checkpoint: the layout's folder with the merged numbers, a manifest of what was done, and a card."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edits.checkpoint.folder import Progress, refuse_occupied
from edits.checkpoint.source import source_files
from edits.checkpoint.stream import Json
from edits.checkpoint.write import OutTensor, refuse_inside, write_checkpoint
from edits.merge.card import card
from edits.merge.job import Job
from edits.merge.manifest import MANIFEST, MergedModel, MergedTensor, MergeManifest
from edits.merge.pieces import MAKERS, Rooms
from edits.merge.plan import MergePlan, dumped, plan
from edits.merge.produce import Produced
from edits.merge.recipe import Recipe
from steer.anatomy.headers import Entry, read_headers
from steer.errors import SteerError
from steer.identity import canonical
from steer.threads import one_thread


@dataclass(frozen=True)
class Merged(os.PathLike[str]):
    """A merged checkpoint on disk; usable wherever a path is.

    Attributes:
        path: the folder.
        manifest: what was done.
    """

    path: Path
    manifest: MergeManifest

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        """Return the path, since libraries write `str(path)` where they mean a path."""
        return str(self.path)

    @property
    def survived(self) -> float | None:
        """Smallest share of a wanted change that survived the cast; None for methods without a base."""
        return min((each.survived for each in self.manifest.tensors if each.survived is not None), default=None)

    def rows(self) -> list[tuple[object, ...]]:
        """One row per merged tensor: name, method, share of numbers that changed, share of the change that survived."""
        return [
            (
                each.name,
                each.method,
                None if each.changed is None else each.changed / max(1, each.numbers),
                each.survived,
            )
            for each in self.manifest.tensors
        ]

    def summary(self) -> list[str]:
        """Say in a few sentences what was done."""
        return [f"{self.path}: {self.manifest.coverage}", *(f"note: {note}" for note in self.manifest.notes)]

    def _repr_html_(self) -> str:
        return "".join(f"<div>{html.escape(line)}</div>" for line in self.summary())


def merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    link: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge models as a recipe says, into a new folder.

    Args:
        recipe: a `Recipe`, a YAML file of mergekit's format, or the same as a mapping.
        out: a new folder, outside the models.
        resume: finish `out.partial`; finished files are checked and skipped, the result has the same bytes.
        link: share files that stay with the model by hard links where the file system can.
        progress: called with numbers of bytes as they are done.

    Raises:
        SteerError: the recipe or a model is refused (`plan` says what), the output is taken or lies inside a model, the
            partial folder was begun with something else, the disk refuses.
    """
    return plan(recipe).merge(out, resume=resume, link=link, progress=progress)


def write(
    made: MergePlan, out: Path, *, resume: bool = False, link: bool = False, progress: Progress | None = None
) -> Merged:
    """Write what a plan describes; see `merge`."""
    refuse_inside(out, {headers.folder for headers in made.folders.values()})
    refuse_occupied(out, resume)
    _check_carried(made)
    rooms = Rooms()
    tensors = [_out(job, rooms) for job in made.jobs] + [
        OutTensor(name, entry.dtype, entry.shape, entry.file, (folder / entry.file, entry), None)
        for name, (folder, entry) in made.carried.items()
    ]
    texts = {"README.md": card(made)} | ({} if made.config is None else {"config.json": dumped(made.config)})
    key = _key(made)
    _check_unchanged(made)

    def seal(unfinished: Path, records: Mapping[str, Json]) -> None:
        _check_unchanged(made, key)
        _manifest(made, records).write(unfinished, made.recipe.to_yaml())

    def sealed(unfinished: Path) -> bool:
        return (unfinished / MANIFEST).is_file() and MergeManifest.read(unfinished).key == canonical(key)

    with one_thread():
        path = write_checkpoint(
            out, tensors, made.files, key=key, seal=seal, sealed=sealed, texts=texts, resume=resume, link=link, makers=MAKERS, progress=progress
        )  # fmt: skip
    return Merged(path, MergeManifest.read(path))


def _out(job: Job, rooms: Rooms) -> OutTensor:
    if job.method == "kept":
        stored = job.terms[0].stored
        return OutTensor(job.name, job.dtype, job.shape, job.file, (stored.path, stored.entry), None)
    made = Produced(job, rooms)
    return OutTensor(job.name, job.dtype, job.shape, job.file, None, made.pieces, made.record)


def _check_carried(made: MergePlan) -> None:
    """Refuse tensors of integers that differ between models: there is no mean of them.

    Raises:
        SteerError: one differs.
    """
    first, *rest = made.folders.values()
    for name, (folder, entry) in made.carried.items():
        for headers in rest:
            other = headers.tensors[name]
            if _bytes(folder / entry.file, entry) != _bytes(headers.folder / other.file, other):
                raise SteerError(
                    f"{name} holds {entry.dtype} that differ between {first.folder} and {headers.folder}",
                    "numbers of floats, or equal integers",
                    "Dequantise the models first, or make the tensors equal",
                )


def _bytes(path: Path, entry: Entry) -> bytes:
    with path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.end - entry.start)


def _check_unchanged(made: MergePlan, key: Json | None = None) -> None:
    """Refuse models that are not those that were planned for: the places of their tensors would be others.

    Raises:
        SteerError: a header says something else than on planning, or a file has another size or time than `key` says.
    """
    now = None if key is None else _key(made)
    for name, headers in made.folders.items():
        if read_headers(headers.folder).tensors != headers.tensors or (
            key is not None and now is not None and now["models"][name] != key["models"][name]
        ):
            raise SteerError(
                f"the model {name} has changed since the merge was planned",
                "the models that were planned for",
                "Merge again, without what was written so far",
            )


def _key(made: MergePlan) -> Json:
    """What the bytes follow from: the recipe, and each model's files with their sizes and times."""
    models = {}
    for name, headers in made.folders.items():
        stats = {file: (headers.folder / file).stat() for file in headers.files}
        models[name] = [
            str(headers.folder.resolve()), {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
        ]  # fmt: skip
    recipe = {key: value for key, value in made.recipe.source.items() if key != "seed"} | {"seed": made.recipe.seed}
    return {
        "recipe": recipe,
        "models": models,
        "files": {file.name: [file.size, file.modified] for file in made.files},
    }


def _manifest(made: MergePlan, records: Mapping[str, Json]) -> MergeManifest:
    found = {name: record for file in records.values() for name, record in file.get("tensors", {}).items()}
    tensors = tuple(MergedTensor(**found[job.name]) for job in made.jobs if job.method != "kept")
    kept: dict[str, list[str]] = {}
    for job in made.jobs:
        if job.method == "kept":
            kept.setdefault(job.terms[0].model, []).append(job.name)
    for name in made.carried:
        kept.setdefault(next(iter(made.folders)), []).append(name)
    return MergeManifest(
        method=made.recipe.merge_method,
        models=tuple(_model(made, name) for name in made.folders),
        coverage=_coverage(made, tensors),
        notes=[*made.notes, *_found_out(tensors)],
        tensors=tensors,
        kept=kept,
        key=canonical(_key(made)),
    )


def _model(made: MergePlan, name: str) -> MergedModel:
    headers = made.folders[name]
    return MergedModel(
        name=name,
        folder=str(headers.folder.resolve()),
        family=str(headers.config.get("model_type")),
        tensors=len(headers.tensors),
        bytes=headers.bytes,
        hashes={
            file.name: file.known_hash
            for file in source_files(headers.folder)
            if file.name in headers.files and file.known_hash is not None
        },
    )


def _coverage(made: MergePlan, tensors: Sequence[MergedTensor]) -> str:
    """Count what was merged, and say what the cast left of it."""
    total = len(made.jobs) + len(made.carried)
    said = f"{len(tensors)}/{total} tensors merged ({made.recipe.merge_method})"
    counted = [(each.changed, each.numbers) for each in tensors if each.changed is not None]
    if counted:
        changed, numbers = (sum(column) for column in zip(*counted, strict=True))
        said += f"; {changed:,} of {numbers:,} numbers differ from {next(iter(made.folders))}"
    shares = [each.survived for each in tensors if each.survived is not None]
    return said + (f"; at least {min(shares):.4f} of the wanted change survived the cast" if shares else "")


def _found_out(tensors: Sequence[MergedTensor]) -> list[str]:
    """What is known only after the arithmetic, and worth a word."""
    notes = []
    straight = sum(each.straight is True for each in tensors)
    if straight:
        notes.append(
            f"slerp was linear interpolation on {straight} of {len(tensors)} tensors, where |cos| > 0.9995; mergekit does so without a word"
        )
    ties = sum(each.ties or 0 for each in tensors)
    if ties:
        notes.append(
            f"{ties} numbers at the edge of what TIES keeps have the magnitude of kept ones; the first in storage order are kept"
        )
    odd = [each.name for each in tensors if each.not_finite]
    if odd:
        notes.append(
            f"{odd[0]} and {len(odd) - 1} more tensors hold infinite numbers or NaN: check the models, or take a wider out_dtype"
        )
    filled = {each.filled for each in tensors if each.filled}
    if filled:
        notes.append(f"vocabularies differ: {max(filled)} rows of tokens were left out, or filled with the base's")
    return notes
