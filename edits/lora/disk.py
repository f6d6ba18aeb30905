"""One matrix at a time from a checkpoint on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from steer.anatomy.headers import Headers, read_headers
from steer.anatomy.record import read_record
from steer.anatomy.resolve import Anatomy, resolve
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError
from steer.identity import ModelIdentity, shape_id
from steer.sources import locate
from steer.targets import PLAIN
from steer.weights import weights_id


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are read when they are needed."""

    name: str
    headers: Headers
    anatomy: Anatomy

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.headers.folder

    @property
    def identity(self) -> ModelIdentity:
        """Its name, shape and, where they are known, weights."""
        numbers = shape_id(self.anatomy.numbers())
        return ModelIdentity(self.name, self.anatomy.family, numbers, weights_id(self.folder, self.headers.files))

    def matrix(self, matrix: Matrix) -> Float[Tensor, "out in"]:
        """Read one matrix, in its dtype.

        Raises:
            SteerError: there is none, or it is no plain tensor of floating point.
        """
        return self.read(self.anatomy.on_disk(matrix))

    def read(self, slot: Slot) -> Float[Tensor, "out in"]:
        """Read what lies at a place in a tensor; errors as `matrix`."""
        entry = self.headers.tensors[slot.name]
        if entry.dtype not in PLAIN:
            raise SteerError(
                f"{slot.name} of {self.folder} is of dtype {entry.dtype}: quantised",
                f"a plain tensor of {', '.join(PLAIN)}",
                "Make the adapter from the unquantised model; it can then be run on the quantised one",
            )
        with safe_open(self.folder / entry.file, framework="pt") as file:
            stored = file.get_tensor(slot.name) if slot.expert is None else file.get_slice(slot.name)[slot.expert]
        found: Tensor = replace(slot, expert=None).view(stored)
        return found


def checkpoint(model: str | Path, anatomy: str | Path | None = None) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        model: hub id, folder, `file.gguf` or `organism:NAME`.
        anatomy: a record of the user's own.

    Raises:
        SteerError: there is none, or its family is unknown.
    """
    headers = read_headers(locate(str(model)).folder)
    record = None if anatomy is None else read_record(anatomy)
    return Checkpoint(str(model), headers, resolve(headers.config, headers.shapes, record))
