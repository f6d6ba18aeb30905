"""Tensors of any size in pieces of bounded size: sums of squares, inner products, whether anything is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edits.donors import Donor
from steer.anatomy.slots import Matrix, Slot

CHUNK = 1 << 18  # Numbers in a piece: two megabytes of float64.


def seen_as(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a stored tensor seen as a matrix."""
    return Slot("tensor").shape(shape)


def pieces(shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into pieces of at most `CHUNK` numbers, whole rows where they fit, in the order of memory."""
    height, width = shape
    across, down = min(width, CHUNK), max(1, CHUNK // max(1, width))
    for row in range(0, height, down):
        for column in range(0, width, max(1, across)):
            yield slice(row, min(row + down, height)), slice(column, min(column + across, width))


def square_norm(donor: Donor, matrix: Matrix) -> float:
    """Return the sum of squares of a tensor, in float64 piece by piece in a fixed order."""
    parts = []
    for rows, columns in pieces(seen_as(donor.shapes[matrix])):
        found = donor.read(matrix, rows, columns)
        parts.append(float((found * found).sum()))
    return math.fsum(parts)


def inner_product(first: Donor, second: Donor, matrix: Matrix) -> float:
    """Return the sum of products of two tensors of one shape."""
    parts = []
    for rows, columns in pieces(seen_as(first.shapes[matrix])):
        parts.append(float((first.read(matrix, rows, columns) * second.read(matrix, rows, columns)).sum()))
    return math.fsum(parts)


def is_zero(donor: Donor, matrix: Matrix) -> bool:
    """Whether every number of a tensor is zero; stops at the first one that is not."""
    shape = seen_as(donor.shapes[matrix])
    return not any(bool(torch.any(donor.read(matrix, rows, columns))) for rows, columns in pieces(shape))


@dataclass(frozen=True)
class Difference:
    """A `steer` source: one tensor of a donor, read when it is needed."""

    donor: Donor
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return seen_as(self.donor.shapes[self.matrix])

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return a piece in float64 on the CPU."""
        return self.donor.read(self.matrix, rows, columns)

    def digest(self) -> str:
        """Return a hash of what it would read."""
        return f"{self.matrix.key}={self.donor.digest(self.matrix)}"
