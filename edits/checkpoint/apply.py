"""Write an edited checkpoint: an ordinary Hugging Face folder with every file of its base.

Shards that hold a touched tensor are written in one pass, everything else by kernel copy or, on request, as hard
links. Each touched tensor is hashed before and after, and the manifest says how much of the wanted change survived
the cast to the checkpoint's dtype.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edits.checkpoint import undo
from edits.checkpoint.card import CARD, card, survival_text
from edits.checkpoint.created import changed_config, dumped
from edits.checkpoint.expect import check_expectations
from edits.checkpoint.expect import pin as pin
from edits.checkpoint.folder import Progress, refuse_occupied
from edits.checkpoint.manifest import MANIFEST, PATCH, STORY, Differing, FileRecord, Manifest, TensorRecord
from edits.checkpoint.pieces import Editing
from edits.checkpoint.pieces import edited_bytes as edited_bytes
from edits.checkpoint.plan import Plan
from edits.checkpoint.source import source_files
from edits.checkpoint.stream import Bytes, Json
from edits.checkpoint.touched import Touched
from edits.checkpoint.write import OutTensor, file_hash, hash_of, refuse_inside, write_checkpoint
from steer.anatomy.headers import INDEX
from steer.errors import SteerError
from steer.files import replacing, write_text
from steer.identity import canonical, shape_id
from steer.operations import AddDense
from steer.patches import Patch

CONFIG = "config.json"


@dataclass(frozen=True)
class Edited(os.PathLike[str]):
    """An edited checkpoint on disk; usable wherever a path is.

    Attributes:
        path: the folder.
        manifest: what was done.
    """

    path: Path
    manifest: Manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def survived(self) -> float | None:
        """Smallest share of the wanted change that survived the cast, over all touched tensors."""
        shares = [tensor.survived for tensor in self.manifest.tensors if tensor.survived is not None]
        return min(shares, default=None)

    def __str__(self) -> str:
        """Return the path, since libraries write `str(path)` where they mean a path."""
        return str(self.path)

    def summary(self) -> str:
        """Say in one line what was done."""
        manifest = self.manifest
        share = f"; surviving change: {survival_text(manifest)}" if manifest.tensors else ""
        forced = f"; {len(manifest.forced)} matrices were not what the patch expects" if manifest.forced else ""
        source = "the originals in steer/undo" if manifest.undo == "kept" else "base"
        return f"{self.path}: {manifest.coverage}{share}{forced}; undo from {source}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(t.matrix)}</td><td>{html.escape(t.name)}</td><td>{_number(t.survived)}</td><td>{_number(t.cosine)}</td></tr>"
            for t in self.manifest.edited
        )
        return f"<div>{html.escape(self.summary())}</div><table><tr><th>matrix</th><th>tensor</th><th>survived</th><th>cosine</th></tr>{rows}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def apply(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    link: bool = False,
    keep_undo: bool = False,
    hash_all: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Write the checkpoint that a plan describes.

    Args:
        plan: from `patch.plan(folder)`.
        out: a new folder, outside the base.
        resume: finish `out.partial`; finished files are checked and skipped, the result has the same bytes.
        link: share untouched files with the base by hard links where the file system can.
        keep_undo: store the original numbers that may change, so that `revert` needs no base.
        hash_all: hash every file while it is written, not the touched tensors alone; kept bytes are then read.
        progress: called with numbers of bytes as they are done.

    Raises:
        SteerError: the output exists or lies inside the base; the base is not what the patch expects; a partial folder
            is in the way or was begun with something else; the base changes meanwhile; the disk refuses.
    """
    refuse_inside(out, {plan.folder})
    refuse_occupied(out, resume)
    check_unchanged(plan)
    forced = check_expectations(plan)
    options = {"dtype": plan.dtype, "untie": plan.untie, "hash_all": hash_all}
    kept = "kept" if keep_undo else "base"
    said = {"patch": plan.patch.fingerprint, "base": str(plan.folder.resolve()), "undo": kept}

    def seal(unfinished: Path, records: Mapping[str, Json]) -> None:
        check_unchanged(plan)
        _save_patch(plan.patch, unfinished)
        manifest = replace(_manifest(plan, unfinished, records, forced), undo=kept, options=options)
        _with_card(manifest, unfinished, plan, hash_all).write(unfinished)

    def sealed(unfinished: Path) -> bool:
        if not (unfinished / MANIFEST).exists():
            return False
        found = Manifest.read(unfinished)
        return {name: getattr(found, name) for name in said} == said and found.options == options

    written = write_checkpoint(
        out,
        out_tensors(plan),
        [file for file in plan.files if file.name != CARD],
        key={**said, **options, **_state(plan)},
        seal=seal,
        sealed=sealed,
        texts={CONFIG: dumped(changed_config(plan.headers.config, plan.config))} if plan.config else {},
        extra=undo.tasks(plan, keep_undo),
        resume=resume,
        link=link,
        hash_all=hash_all,
        progress=progress,
    )
    return Edited(written, Manifest.read(written))


def check_unchanged(plan: Plan) -> None:
    """Refuse a base that is not the one that was planned for: the places of its tensors would be others.

    Raises:
        SteerError: a file was added, taken away, or has another size or time.
    """
    if (now := source_files(plan.folder)) != plan.files:
        names = sorted({file.name for file in {*now} ^ {*plan.files}})
        raise SteerError(
            f"{names[0]} of {plan.folder} has changed since the patch was planned",
            "the base that was planned for",
            "Plan again, without what was written so far",
        )


def _state(plan: Plan) -> Json:
    """What the bytes depend on beside patch and options: the files of the base, and where the anatomy finds each matrix."""
    places = [(t.name, [(e.matrix.key, e.slot, e.head_width) for e in t.edits]) for t in plan.touched]
    files = {file.name: [file.size, file.modified] for file in plan.files}
    return {"files": files, "places": hash_of(repr(places).encode())}


def out_tensors(plan: Plan) -> list[OutTensor]:
    """Return every tensor of the result, kept or made."""
    made = {tensor.name: tensor for tensor in (*plan.touched, *plan.widened)}
    found = [
        OutTensor(name, entry.dtype, entry.shape, entry.file, kept=(plan.folder / entry.file, entry))
        for name, entry in plan.headers.tensors.items()
        if name not in made
    ]
    for tensor in made.values():
        make, record = _maker(plan.folder, tensor)
        found.append(OutTensor(tensor.name, tensor.dtype, tensor.shape, tensor.file, make=make, record=record))
    order = {name: number for number, name in enumerate([*plan.headers.tensors, *made])}
    return sorted(found, key=lambda tensor: order[tensor.name])


def _maker(folder: Path, tensor: Touched) -> tuple[Callable[[], Iterator[Bytes]], Callable[[], Json]]:
    """Return what makes a tensor, and what then says how that went."""
    last: list[Editing] = []

    def make() -> Iterator[Bytes]:
        last[:] = [Editing(folder, tensor)]
        return last[0].pieces()

    return make, lambda: last[0].record()


def _save_patch(patch: Patch, unfinished: Path) -> None:
    """Write the patch beside the manifest; one that reads its numbers from other checkpoints is described instead."""
    lazy = [each for each in patch.operations if isinstance(each, AddDense) and not hasattr(each.delta, "dtype")]
    if not lazy:
        patch.save(unfinished / PATCH, overwrite=True)
        return
    story = {
        "fingerprint": patch.fingerprint,
        "operations": [{**each.as_json(), "digest": each.digest()} for each in patch.operations],
        "provenance": dict(patch.provenance),
    }
    write_text(unfinished / STORY, canonical(story) + "\n", overwrite=True)


def _manifest(plan: Plan, unfinished: Path, records: Mapping[str, Json], forced: tuple[Differing, ...]) -> Manifest:
    made = (*plan.touched, *plan.widened)
    tensors = tuple(TensorRecord(**records[tensor.file]["tensors"][tensor.name]) for tensor in made)
    return Manifest(
        base=str(plan.folder.resolve()),
        family=str(plan.headers.config.get("model_type")),
        shape_id=shape_id(plan.anatomy.numbers()) if plan.anatomy is not None else "",
        patch=plan.patch.fingerprint,
        coverage=plan.coverage,
        undo="base",
        options={},
        config=plan.config,
        forced=forced,
        tensors=tensors,
        files=tuple(_files(plan, unfinished, records)),
    )


def _files(plan: Plan, unfinished: Path, records: Mapping[str, Json]) -> list[FileRecord]:
    changed = {tensor.file for tensor in (*plan.touched, *plan.widened)}
    rewritten = undo.rewritten(plan)
    found = []
    for file in plan.files:
        if file.name == CARD:
            continue
        change = "kept"
        if file.name in rewritten:
            change = "rewritten"
        elif file.name in changed:
            change = "spliced"
        elif file.name in (CONFIG, INDEX) and (unfinished / file.name).read_bytes() != file.path.read_bytes():
            change = "replaced"
        size, digest = (unfinished / file.target).stat().st_size, records[file.target].get("sha256")
        found.append(FileRecord(file.target, size, change, file.known_hash, digest))
    return found


def _with_card(manifest: Manifest, unfinished: Path, plan: Plan, hash_all: bool) -> Manifest:
    """Write the card, and return the manifest with its record."""
    path = unfinished / CARD
    with replacing(path, overwrite=True) as written:
        written.write_bytes(card(plan, manifest))
    known = next((file.known_hash for file in plan.files if file.name == CARD), None)
    change = "replaced" if any(file.name == CARD for file in plan.files) else "added"
    record = FileRecord(CARD, path.stat().st_size, change, known, file_hash(path) if hash_all else None)
    files = sorted((*manifest.files, record), key=lambda file: file.name)
    return replace(manifest, files=tuple(files))
