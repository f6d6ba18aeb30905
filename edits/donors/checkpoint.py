"""A folder of safetensors as a donor: headers are read at once, numbers when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edits.checkpoint.stream import read_exactly
from edits.donors.donor import Shapes
from steer.anatomy.headers import BYTES, Entry, Headers
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError
from steer.identity import canonical, digest

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
