"""How much one matrix differs from another: size, spread and rank of the difference, in bounded memory.

All sums are float64 and run over blocks of rows in order, so the figures do not depend on how a checkpoint is cut
into files. The rank is that of what a change of weights left behind after each side was rounded to its own dtype,
hence needs a tolerance. Ours: an entry that differs carries a rounding error of at most p = sqrt((u_a a)² + (u_b b)²),
where u is half a unit in the last place of the dtype relative to the number (2^-9 for bf16, 2^-24 for fp32); a matrix
of independent errors of that size has a spectral norm of about

    tolerance = max over rows ‖p_row‖ + max over columns ‖p_column‖

(Bandeira and van Handel, arXiv 1408.6185; p is at least sqrt(3) times the standard deviation, which is the margin).
Singular values of a - b above the tolerance are counted. So B = fl(A + rank r) has rank r in fp32 and in bf16, as long
as the change stands out from the rounding; a change that drowns in it counts 0.

Singular values come from a randomised range finder (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.1 on
the row space, fixed seed, 10 directions more than the limit): Z = Ψᵀ D by blocks of rows, Q = an orthonormal basis of
the columns of Zᵀ, then the triangle R of D Q by blocks; R and D Q have the same singular values, which are never above
those of D. A direction within a few times of the tolerance can be missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from edits.checkpoint.rows import BITS, FLOATING, Rows, values
from edits.checkpoint.stream import Bytes
from steer.anatomy.headers import BYTES

LIMIT = 64
OVERSAMPLING = 10
SEED = 0


@dataclass(frozen=True)
class Change:
    """How much b differs from a; parts of one tensor add up.

    Attributes:
        entries: how many numbers were compared.
        changed: how many of them differ: in their bits, or in their value where the dtypes differ.
        not_finite: how many differ and have no finite difference; they count in `changed` and nowhere else.
        largest: max |a - b|.
        square: ‖a - b‖², Frobenius.
        before: ‖a‖², Frobenius, over finite numbers.
        rank: of a - b, of the slice with the largest where there are several; None where it was not asked for or
            has no meaning. At most the limit that was asked for, plus one for "more than the limit".
        captured: share of ‖a - b‖² that lies in the counted directions.
    """

    entries: int = 0
    changed: int = 0
    not_finite: int = 0
    largest: float = 0.0
    square: float = 0.0
    before: float = 0.0
    rank: int | None = None
    captured: float = 0.0

    def __add__(self, other: Change) -> Change:
        square = self.square + other.square
        ranks = [rank for rank in (self.rank, other.rank) if rank is not None]
        captured = self.captured * self.square + other.captured * other.square
        return Change(
            self.entries + other.entries,
            self.changed + other.changed,
            self.not_finite + other.not_finite,
            max(self.largest, other.largest),
            square,
            self.before + other.before,
            max(ranks, default=None),
            captured / square if square else 0.0,
        )

    @property
    def norm(self) -> float:
        """‖a - b‖."""
        return math.sqrt(self.square)

    @property
    def relative(self) -> float:
        """‖a - b‖ / ‖a‖; infinite where a is zero and b is not."""
        return self.norm / math.sqrt(self.before) if self.before else math.inf if self.square else 0.0

    @property
    def share(self) -> float:
        """Changed entries of all."""
        return self.changed / self.entries if self.entries else 0.0


class Block(NamedTuple):
    """Some rows of both sides in float64, and where they differ; differences that are not finite are set to 0."""

    start: int
    before: Float[np.ndarray, "row column"]
    after: Float[np.ndarray, "row column"]
    changed: Bool[np.ndarray, "row column"]
    not_finite: int

    @property
    def difference(self) -> Float[np.ndarray, "row column"]:
        """A - b."""
        difference: np.ndarray = self.before - self.after
        return difference


def same_rows(a: Rows, b: Rows) -> bool:
    """Whether both have the same bytes; stops at the first block that differs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(np.array_equal(a.read(*step), b.read(*step)) for step in a.steps())


def change_of(a: Rows, b: Rows, limit: int = LIMIT) -> Change:
    """Measure how b differs from a, two matrices of one shape.

    Args:
        a, b: read once, twice where a rank is asked for.
        limit: up to which rank is counted; 0 for no rank. Matrices of whole numbers, and vectors, have none.
    """
    columns = a.shape[1]
    wants = limit > 0 and min(a.shape) > 1 and a.dtype in FLOATING and b.dtype in FLOATING
    width = min(limit + OVERSAMPLING, columns)
    sketch, profile = np.zeros((width, columns)), _Profile.empty(columns)
    found = Change()
    for block in _blocks(a, b):
        found += _measured(block)
        if wants and block.changed.any():
            test = np.random.default_rng([SEED, block.start]).standard_normal((len(block.before), width))
            sketch += test.T @ block.difference
            profile = profile.with_(block, a.dtype, b.dtype)
    if not wants or not found.changed or not math.isfinite(found.square):
        return found
    if found.square == 0:
        return replace(found, rank=0)
    scale = 2.0 ** math.floor(math.log2(found.norm))
    basis = np.eye(columns) if width == columns else np.linalg.qr(sketch.T / scale)[0]
    singular = _singular_values(a, b, basis / scale) * scale
    tolerance = profile.tolerance + 64 * np.finfo(np.float64).eps * found.norm
    above = singular[singular > tolerance]
    captured = float(np.sum((above[:limit] / scale) ** 2)) / (found.square / scale**2)
    return replace(found, rank=min(len(above), limit + 1), captured=min(captured, 1.0))


def _blocks(a: Rows, b: Rows) -> Iterator[Block]:
    for start, stop in a.steps():
        x, y = a.read(start, stop), b.read(start, stop)
        before, after = values(x, a.dtype), values(y, b.dtype)
        changed = before != after
        if a.dtype == b.dtype and a.dtype != "C64":
            changed = _bits(x, a.dtype) != _bits(y, b.dtype)
        finite = np.isfinite(before) & np.isfinite(after)
        wrong = ~finite
        if wrong.any():
            before, after = np.where(finite, before, 0.0), np.where(finite, after, 0.0)
        shape = (stop - start, -1)
        yield Block(
            start,
            before.reshape(shape),
            after.reshape(shape),
            changed.reshape(shape),
            int(np.count_nonzero(wrong & changed)),
        )


def _bits(data: Bytes, dtype: str) -> np.ndarray:
    return data.view(BITS[BYTES[dtype]])


def _measured(block: Block) -> Change:
    difference = block.difference
    return Change(
        entries=block.before.size,
        changed=int(np.count_nonzero(block.changed)),
        not_finite=block.not_finite,
        largest=float(np.abs(difference).max(initial=0.0)),
        square=float(np.square(difference).sum()),
        before=float(np.square(block.before).sum()),
    )


class _Profile(NamedTuple):
    """Squared norms of what rounding can have added, per row (the largest) and per column (all)."""

    row: float
    columns: Float[np.ndarray, " column"]

    @classmethod
    def empty(cls, columns: int) -> _Profile:
        return cls(0.0, np.zeros(columns))

    def with_(self, block: Block, first: str, second: str) -> _Profile:
        p = np.where(block.changed, _rounding(block.before, first) + _rounding(block.after, second), 0.0)
        return _Profile(max(self.row, float(p.sum(1).max())), self.columns + p.sum(0))

    @property
    def tolerance(self) -> float:
        return math.sqrt(self.row) + math.sqrt(float(self.columns.max()))


def _rounding(numbers: Float[np.ndarray, "row column"], dtype: str) -> Float[np.ndarray, "row column"]:
    """Squared largest error of rounding to a dtype."""
    limits = torch.finfo(FLOATING[dtype])
    return np.square(numbers * (limits.eps / 2)) + (limits.tiny * limits.eps / 2) ** 2


def _singular_values(a: Rows, b: Rows, basis: Float[np.ndarray, "column width"]) -> Float[np.ndarray, " found"]:
    """Return the singular values of (a - b) @ basis, largest first."""
    triangle = np.zeros((0, basis.shape[1]))
    for block in _blocks(a, b):
        if block.changed.any():
            triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block.difference @ basis]), mode="r"))
    found: np.ndarray = np.linalg.svd(triangle, compute_uv=False)
    return found
