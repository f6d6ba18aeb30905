"""LoRA adapters as donors, by themselves or on a checkpoint: the dense product (alpha / r) B A, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from edits.donors.checkpoint import Checkpoint
from edits.donors.donor import Shapes
from steer.anatomy.headers import read_headers
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix, Slot
from steer.identity import digest
from steer.operations import AddLowRank
from steer.patches import Patch
from steer.sources import locate


@dataclass(frozen=True)
class Place:
    """Where a target of an adapter lies in a checkpoint: which tensor, its stored shape, and what part of it."""

    tensor: Matrix
    shape: tuple[int, ...]
    slot: Slot


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter by itself: W -> (alpha / r) B A.

    Attributes:
        folder: of the adapter.
        strength: times alpha / r.
        operations: what it does, strengths and all.
        places: of each operation, the tensor that its matrix lies in, its stored shape, and where; None names every
            target as the adapter does, as a tensor of its own.
    """

    folder: Path
    strength: float
    operations: tuple[AddLowRank, ...] = field(repr=False)
    places: tuple[Place, ...] | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The folder, and its strength where that is not 1."""
        return str(self.folder) + ("" if self.strength == 1 else f"@{self.strength!r}")

    @property
    def whole(self) -> float:
        """0, since it says what is added to a model."""
        return 0.0

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """None."""
        return ()

    @cached_property
    def by_tensor(self) -> Mapping[Matrix, list[tuple[AddLowRank, Place]]]:
        """Its operations, by the tensor that they add to."""
        own = [Place(each.matrix, (each.B.shape[0], each.A.shape[1]), Slot("")) for each in self.operations]
        found: dict[Matrix, list[tuple[AddLowRank, Place]]] = {}
        for operation, place in zip(self.operations, self.places or own, strict=True):
            found.setdefault(place.tensor, []).append((operation, place))
        return found

    @cached_property
    def shapes(self) -> Shapes:
        """The tensors that it adds to."""
        return {tensor: placed[0][1].shape for tensor, placed in self.by_tensor.items()}

    def read(self, matrix: Matrix, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return a piece of the product; zeros where it adds nothing."""
        total = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.float64)
        for operation, place in self.by_tensor.get(matrix, ()):
            if place.slot.expert is None:
                total += _product(operation, place.slot.transposed, rows, columns)
            elif rows.start <= place.slot.expert < rows.stop:
                total[place.slot.expert - rows.start] += _expert_product(operation, place, columns)
        return total

    def digest(self, matrix: Matrix) -> str:
        """Return the hash of its factors for this tensor."""
        parts = [f"{each.matrix.key} {each.weight!r} {each.digest()}" for each, _ in self.by_tensor.get(matrix, ())]
        return digest([part.encode() for part in parts])

    def on(self, checkpoint: Checkpoint) -> Adapter:
        """Return the adapter under the names that the checkpoint has for its targets, experts of any layout too.

        Raises:
            SteerError: a target is not there, or has another shape.
        """
        known = operations_of(self.folder, self.strength, checkpoint.anatomy)
        places = []
        for operation in known:
            matrix = operation.matrix
            slot = Slot(matrix.module) if matrix.raw else checkpoint.anatomy.on_disk(matrix)
            tensor = Matrix(-1, slot.name)
            stored = checkpoint.entry(tensor).shape
            operation.check(slot.shape(stored), 1)
            places.append(Place(tensor, stored, slot))
        return Adapter(self.folder, self.strength, known, tuple(places))


@dataclass(frozen=True, eq=False)
class Adapted:
    """A checkpoint with adapters: W + (alpha / r) B A, summed in float64.

    Attributes:
        base: the checkpoint.
        adapters: by names of tensors, as `Adapter.on` makes them.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]

    @property
    def label(self) -> str:
        """As the user wrote it."""
        return "+".join([self.base.label, *(adapter.label for adapter in self.adapters)])

    @property
    def whole(self) -> float:
        """1."""
        return 1.0

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The base."""
        return (self.base,)

    @property
    def shapes(self) -> Shapes:
        """Those of the base."""
        return self.base.shapes

    def read(self, matrix: Matrix, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return a piece of the sum."""
        total = self.base.read(matrix, rows, columns)
        for adapter in self.adapters:
            if matrix in adapter.by_tensor:
                total += adapter.read(matrix, rows, columns)
        return total

    def digest(self, matrix: Matrix) -> str:
        """Return the hash of the base's tensor and of the factors."""
        parts = [self.base.digest(matrix), *(adapter.digest(matrix) for adapter in self.adapters)]
        return digest([part.encode() for part in parts])


def as_patch(adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Patch:
    """Return a LoRA adapter as a patch: W <- W + (alpha / r) B A for each of its targets.

    Args:
        adapter: its folder.
        base: the model that it is for, which gives the targets their logical names; needed for fused experts.

    Raises:
        SteerError: it is no plain LoRA; there is no such model.
    """
    from steer.adapters import read

    if base is None:
        return read(Path(adapter))
    headers = read_headers(locate(os.fspath(base)).folder)
    return read(Path(adapter), resolve(headers.config, headers.shapes))


def operations_of(folder: Path, strength: float, anatomy: Anatomy | None = None) -> tuple[AddLowRank, ...]:
    from steer.adapters import read

    found = []
    for operation in read(folder, anatomy).operations:
        assert isinstance(operation, AddLowRank)
        found.append(operation.scaled(strength))
    return tuple(found)


def _product(operation: AddLowRank, transposed: bool, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
    """A piece of weight B A, counted as it is stored."""
    rows, columns = (columns, rows) if transposed else (rows, columns)
    nothing = torch.zeros(1, 1, dtype=torch.float64).expand(rows.stop - rows.start, columns.stop - columns.start)
    found = operation.change(nothing, rows, columns)
    return found.T if transposed else found


def _expert_product(operation: AddLowRank, place: Place, columns: slice) -> Float[Tensor, " columns"]:
    """Numbers `columns` of one expert of a fused tensor, flattened: only the stored rows that they lie in are made."""
    height, width = place.shape[-2:]
    first, last = columns.start // width, -(-columns.stop // width)
    band = torch.zeros(last - first, width, dtype=torch.float64)
    out = range(*slice(*(place.slot.rows or (0, None, 1))).indices(width if place.slot.transposed else height))
    if place.slot.transposed:  # Stored as (in, out): the band is a range of inputs.
        band[:, out.start : out.stop : out.step] = _product(operation, True, slice(first, last), slice(0, len(out)))
    else:
        inside = [index for index, row in enumerate(out) if first <= row < last]
        if inside:
            start = out[inside[0]] - first
            product = _product(operation, False, slice(inside[0], inside[-1] + 1), slice(0, width))
            band[start : start + len(inside) * out.step : out.step] = product
    return band.reshape(-1)[columns.start - first * width : columns.stop - first * width]
