"""Whether a base is the one that a patch was made for: hashes of the matrices that it touches, before anything is written.

The hash of a matrix is that of its numbers in the order in which they are stored, so it does not depend on whether
experts lie in one tensor or in many; for a plain tensor it is the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from edits.checkpoint.created import head_name
from edits.checkpoint.manifest import Differing
from edits.checkpoint.pieces import CHUNK, TORCH, is_fused, part_of
from edits.checkpoint.stream import read_exactly
from edits.checkpoint.touched import SlotEdit, Touched
from edits.checkpoint.write import region_hash
from steer.anatomy.headers import BYTES
from steer.errors import SteerError
from steer.patches import Patch

if TYPE_CHECKING:
    from edits.checkpoint.plan import Plan


def pin(plan: Plan) -> Patch:
    """Return the plan's patch with the hashes of the matrices that it touches, so that it fits this base alone."""
    there = [tensor for tensor in plan.touched if not tensor.created]
    hashes = {edit.matrix: matrix_hash(plan, tensor, edit) for tensor in there for edit in tensor.edits}
    return replace(plan.patch, expects=hashes)


def check_expectations(plan: Plan) -> tuple[Differing, ...]:
    """Compare the base with what the patch expects.

    Returns:
        What differs, where the plan says that this is no obstacle.

    Raises:
        SteerError: a hash differs.
    """
    _check_head(plan)
    differing = []
    for tensor in plan.touched:
        for edit in tensor.edits:
            expected = plan.patch.expects.get(edit.matrix)
            if expected is None or tensor.created:
                continue
            found = matrix_hash(plan, tensor, edit)
            if found != expected and not plan.force_base:
                raise SteerError(
                    f"{tensor.name} of {plan.folder} has the hash {found[:19]}…",
                    f"{expected[:19]}…, which the patch was made for",
                    "Apply it to the model it was made on, make it again, or go on with --force-base (force_base=True), "
                    "which says what differs",
                )
            if found != expected:
                differing.append(Differing(str(edit.matrix), found, expected))
    return tuple(differing)


def _check_head(plan: Plan) -> None:
    """A tied checkpoint may store its head all the same, and engines differ in which they take: the two must be equal."""
    if not plan.untie or plan.anatomy is None or (name := head_name(plan.anatomy)) not in plan.headers.tensors:
        return
    head, embedding = (plan.headers.tensors[each] for each in (name, plan.anatomy.disk_name("embedding")))
    hashes = {region_hash(plan.folder / each.file, each.start, each.end) for each in (head, embedding)}
    if len(hashes) != 1:
        raise SteerError(
            f"{plan.folder} stores {name} with other numbers than the embedding that it is tied to",
            "one that was never used, or none",
            "Set tie_word_embeddings to false in its config.json if the stored head is meant, and leave --untie out",
        )


def matrix_hash(plan: Plan, tensor: Touched, edit: SlotEdit) -> str:
    """Return the hash of one matrix of the base, read in pieces."""
    digest, entry = hashlib.sha256(), tensor.entry
    assert entry is not None
    _, rows, width = tensor.axes
    size, begin = BYTES[entry.dtype], (edit.slot.expert or 0) * rows
    inner = tensor.shape[1:] if is_fused(tensor) else tensor.shape
    source = os.open(plan.folder / entry.file, os.O_RDONLY)
    try:
        step = max(1, CHUNK // max(1, width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first, last = ((begin + row) * width * size for row in (start, stop))
            raw = read_exactly(source, entry.start + first, entry.start + last)
            shape = (stop - start, *inner[1:]) if inner else ()
            found = part_of(edit, torch.from_numpy(raw).view(TORCH[entry.dtype]).view(shape), start)
            if found is not None:
                view = found[0].T if edit.slot.transposed and len(inner) == 2 else found[0]
                digest.update(view.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    finally:
        os.close(source)
    return "sha256:" + digest.hexdigest()
