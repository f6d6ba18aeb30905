"""What a donor is: tensors of floating point that can be read in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from steer.anatomy.slots import Matrix

if TYPE_CHECKING:
    from edits.donors.checkpoint import Checkpoint

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
