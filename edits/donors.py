"""Donors: what weight arithmetic takes numbers from. A donor is opened by its headers and read piece by piece.

A checkpoint gives its tensors; an adapter (LoRA) gives the dense product (alpha / r) B A, made when a piece of it is
asked for; a checkpoint with adapters gives their sum. So a difference of two adapters is B1 A1 - B2 A2, never
(B1 - B2)(A1 - A2), which is another matrix. Numbers come in float64 on the CPU, whatever they are stored in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edits.checkpoint.stream import read_exactly
from steer.anatomy.headers import BYTES, Entry, Headers, read_headers
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError
from steer.identity import canonical, digest
from steer.operations import AddLowRank
from steer.patches import Patch
from steer.sources import locate
from steer.subjects import parse

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Shapes = Mapping[Matrix, tuple[int, ...]]


@runtime_checkable
class Donor(Protocol):
    """Tensors that can be read in pieces; each is seen as a matrix, as `Slot.view` shows a whole tensor."""

    @property
    def label(self) -> str:
        """What the reader calls it."""
        ...

    @property
    def whole(self) -> float:
        """How many whole models it is: 1 for a checkpoint, 0 for a difference or an adapter."""
        ...

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that it reads."""
        ...

    @property
    def shapes(self) -> Shapes:
        """Stored shape of every tensor of floating point; what is not named here counts as zero where `whole` is 0."""
        ...

    def read(self, matrix: Matrix, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return a piece in float64 on the CPU, in memory of its own."""
        ...

    def digest(self, matrix: Matrix) -> str:
        """Return a hash of what `read` reads: of the place of large files (path, size, time), not of their numbers."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of safetensors.

    Attributes:
        label: as the user named it.
        headers: of the folder.
    """

    label: str
    headers: Headers = field(repr=False)

    @property
    def whole(self) -> float:
        """1."""
        return 1.0

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Itself."""
        return (self,)

    @cached_property
    def shapes(self) -> Shapes:
        """Every tensor of floating point, by its name on disk."""
        return {
            Matrix(-1, name): entry.shape
            for name, entry in self.headers.tensors.items()
            if entry.dtype in TORCH and "." in name
        }

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the family calls its parts.

        Raises:
            SteerError: there is no record for the family.
        """
        return resolve(self.headers.config, self.headers.shapes)

    def entry(self, matrix: Matrix) -> Entry:
        """Return where a tensor lies.

        Raises:
            SteerError: there is no such tensor.
        """
        found = self.headers.tensors.get(matrix.module)
        if found is None:
            raise SteerError(
                f"{self.label} has no tensor {matrix}", "a tensor of every donor", "Leave it out by a mask"
            )
        return found

    def stored(self, matrix: Matrix, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return a piece in the dtype that it is stored in."""
        entry = self.entry(matrix)
        return piece(self.headers.folder / entry.file, entry, rows, columns)

    def read(self, matrix: Matrix, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return a piece in float64."""
        return self.stored(matrix, rows, columns).to(torch.float64)

    def digest(self, matrix: Matrix) -> str:
        """Return the hash of name, dtype, shape and the file it is in."""
        entry = self.entry(matrix)
        path = (self.headers.folder / entry.file).resolve()
        status = path.stat()
        file = [path.name] if path.parent.name == "blobs" else [str(path), status.st_size, status.st_mtime_ns]
        return digest([canonical([matrix.key, entry.dtype, list(entry.shape), entry.start, *file]).encode()])


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
        known = _operations(self.folder, self.strength, checkpoint.anatomy)
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


def donor(source: str | os.PathLike[str] | Donor) -> Donor:
    """Open a donor by its headers.

    Args:
        source: a hub id, a folder, `organism:NAME`; the folder of an adapter; `MODEL+ADAPTER[@STRENGTH]`; or a donor.

    Raises:
        SteerError: there is no such thing, or an adapter that is not a plain LoRA.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    text = os.fspath(source)
    if _is_adapter(Path(text)):
        return Adapter(Path(text), 1.0, _operations(Path(text), 1.0))
    subject = parse(text)
    checkpoint = Checkpoint(subject.model, read_headers(locate(subject.model).folder))
    if not subject.changes:
        return checkpoint
    adapters = []
    for path, strength in subject.changes:
        if not _is_adapter(path):
            raise SteerError(
                f"{path} is no folder of an adapter",
                "a folder with adapter_config.json behind the +",
                "Write the patch or steering into a checkpoint first (`steer apply`), and give that folder",
            )
        adapters.append(Adapter(path, strength, ()).on(checkpoint))
    return Adapted(checkpoint, tuple(adapters))


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


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _operations(folder: Path, strength: float, anatomy: Anatomy | None = None) -> tuple[AddLowRank, ...]:
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


def piece(path: Path, entry: Entry, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
    """Read a piece of a stored tensor, seen as a matrix; whole rows in one read, parts of rows through a map.

    Raises:
        SteerError: the file is shorter than its header says, or the tensor has a dtype that is no plain number.
    """
    if entry.dtype not in TORCH:
        raise SteerError(
            f"a tensor of {path} has the dtype {entry.dtype}", f"one of {', '.join(TORCH)}", "Take an unquantised model"
        )
    height, width = Slot(path.name).shape(entry.shape)
    item, shape = BYTES[entry.dtype], (rows.stop - rows.start, columns.stop - columns.start)
    if not shape[0] * shape[1]:
        return torch.empty(shape, dtype=TORCH[entry.dtype])
    if shape[1] == width:
        source = os.open(path, os.O_RDONLY)
        try:
            start = entry.start + rows.start * width * item
            data = read_exactly(source, start, start + shape[0] * width * item)
        finally:
            os.close(source)
    else:
        mapped = np.memmap(path, np.uint8, "r", entry.start, (height, width * item))
        data = np.array(mapped[rows, columns.start * item : columns.stop * item], order="C").reshape(-1)
    return torch.from_numpy(data).view(TORCH[entry.dtype]).view(shape)
