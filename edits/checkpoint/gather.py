"""From the matrices of a patch to the stored tensors that hold them, each found, checked and met by one name only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from edits.checkpoint import created, quantised
from edits.checkpoint.touched import FLOATS, SlotEdit, Touched
from steer.anatomy.headers import BYTES, Headers
from steer.anatomy.packed import SCALES
from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import OUTSIDE, Matrix, Slot
from steer.errors import SteerError
from steer.operations import AddDense, Operation
from steer.patches import Patch
from steer.writers import check_heads


def gathered(
    patch: Patch, headers: Headers, anatomy: Anatomy | None, dtype: str | None, untie: bool
) -> tuple[list[Touched], dict[str, Any]]:
    """Return the tensors that a patch changes or makes, in order of layer, and the keys of config.json that it needs.

    Args:
        patch: the change.
        headers: of the base.
        anatomy: of the base; None where every matrix is named as its tensor.
        dtype: word that narrower floats are widened to.
        untie: make a head of the embedding.

    Raises:
        SteerError: see `edits.checkpoint.plan.plan`.
    """
    edits: dict[str, list[SlotEdit]] = {}
    absent: dict[Matrix, SlotEdit] = {}
    head = created.head_name(anatomy) if untie and anatomy is not None else ""
    for matrix, operations in patch.matrices.items():
        slot = _slot(matrix, operations, headers, anatomy)
        if untie and matrix.module == "head":
            slot = Slot(head)
        if anatomy is not None and anatomy.tied and not untie:
            _refuse_tied(matrix, operations)
        if slot.name in headers.tensors:
            edit = _edit(matrix, slot, operations, headers.tensors[slot.name].shape, anatomy)
            edits.setdefault(slot.name, []).append(edit)
        elif slot.name == head and anatomy is not None:
            shape = headers.tensors[anatomy.disk_name("embedding")].shape
            edits.setdefault(head, []).append(_edit(matrix, slot, operations, shape, anatomy))
        else:
            absent[matrix] = _absent(matrix, slot, operations, headers, anatomy)
    found, config = [], dict[str, Any]()
    for name, parts in edits.items():
        if name in headers.tensors:
            found.append(_touched(name, parts, headers, dtype))
    if untie and anatomy is not None and head not in headers.tensors:
        untied, more = created.untied_head(anatomy, headers, tuple(edits.get(head, ())), dtype)
        found.append(untied)
        config |= more
    elif untie and anatomy is not None:
        config |= created.untied_head(anatomy, headers, (), dtype)[1]
    if absent and anatomy is not None:
        made, more = created.biases(absent, anatomy, headers, dtype)
        found += made
        config |= more
    return found, config


def _slot(matrix: Matrix, operations: tuple[Operation, ...], headers: Headers, anatomy: Anatomy | None) -> Slot:
    if matrix.raw or anatomy is None:
        slot = Slot(matrix.module)
    elif matrix.bias and not anatomy.has_bias(matrix.module, matrix.layer, matrix.expert):
        weight = anatomy.on_disk(Matrix(matrix.layer, matrix.module, matrix.expert))
        if not weight.name.endswith("weight"):  # A fused tensor of experts: no bias can be added beside it.
            raise created.no_bias(matrix, anatomy)
        return Slot(created.bias_of(weight.name))
    else:
        slot = anatomy.on_disk(matrix)
        if (scaled := quantised.block_exponents(matrix, slot, operations, headers)) is not None:
            return scaled
    quantised.refuse(matrix, slot.name, operations, headers)
    if slot.name not in headers.tensors:
        raise SteerError(
            f"{headers.folder} has no tensor {slot.name} for {matrix}",
            "every tensor that the patch names",
            "Check that the checkpoint is complete, and that the patch was made for this layout",
        )
    return slot


def _edit(
    matrix: Matrix, slot: Slot, operations: tuple[Operation, ...], stored: tuple[int, ...], anatomy: Anatomy | None
) -> SlotEdit:
    shape, heads = slot.shape(stored), anatomy.heads if anatomy is not None else 1
    for operation in operations:
        if anatomy is not None:
            check_heads(anatomy, matrix, operation.heads)
        operation.check(shape, heads)
    return SlotEdit(matrix, slot, operations, shape[1] // heads)


def _absent(
    matrix: Matrix, slot: Slot, operations: tuple[Operation, ...], headers: Headers, anatomy: Anatomy | None
) -> SlotEdit:
    """An output bias that is not there yet; anything else that is not there has been refused."""
    weight = slot.name.removesuffix("bias") + "weight"
    quantised.refuse(matrix, weight, operations, headers)
    if weight not in headers.tensors or anatomy is None:
        raise SteerError(f"{headers.folder} has no tensor {slot.name}, nor {weight}", "a projection to add a bias to")
    return _edit(matrix, slot, operations, headers.tensors[weight].shape[:1], anatomy)


def _touched(name: str, edits: Sequence[SlotEdit], headers: Headers, dtype: str | None) -> Touched:
    entry = headers.tensors[name]
    if entry.dtype not in FLOATS and not _are_exponents(edits):
        quantised.refuse(edits[0].matrix, name, edits[0].operations, headers)
        raise SteerError(
            f"{name} has dtype {entry.dtype} and shape {list(entry.shape)}",
            f"a tensor of {', '.join(FLOATS)}",
            quantised.remedy(edits[0].operations) if entry.dtype.startswith("F8") else quantised.QUANTISED_REMEDY,
        )
    for one, two in combinations(edits, 2):
        if _overlap(one.slot, two.slot, entry.shape):
            raise SteerError(
                f"the patch changes {one.matrix} and {two.matrix}, which are both in {name}",
                "one name for it",
                "Name it in one way, or apply the patches one after the other",
            )
    wide = dtype if dtype is not None and BYTES[entry.dtype] < BYTES[dtype] else entry.dtype
    return Touched(name, entry.file, wide, entry.shape, entry, tuple(edits))


def _are_exponents(edits: Sequence[SlotEdit]) -> bool:
    """Whether a tensor of bytes holds the exponents of experts; by its own name none is ever edited."""
    return all(edit.slot.name.endswith(SCALES) and not edit.matrix.raw for edit in edits)


def _overlap(one: Slot, two: Slot, stored: tuple[int, ...]) -> bool:
    if None not in (one.expert, two.expert) and one.expert != two.expert:
        return False
    if one.rows is None or two.rows is None:
        return True
    out = Slot(one.name, one.expert, one.transposed).shape(stored)[0]
    return bool(set(range(out)[slice(*one.rows)]) & set(range(out)[slice(*two.rows)]))


def _refuse_tied(matrix: Matrix, operations: Sequence[Operation]) -> None:
    odd = [each for each in operations if each.weight and not isinstance(each, AddDense)]
    if matrix.module in OUTSIDE and odd:
        raise SteerError(
            f"the embedding is tied to the vocabulary head, and {odd[0].as_json()['operation']} of the {matrix} would change both",
            "an untied model, or a dense difference, which is meant for both",
            "Give the result a head of its own with --untie (untie=True), or use the hook form",
        )
