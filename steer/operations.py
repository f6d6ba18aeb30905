"""Operations on one matrix, and the one function that carries them out.

`edited` is the only code that changes weights: a loaded model (`Patch.on`) and a checkpoint on disk
(`edits.checkpoint`) both call it, so the two can be compared byte by byte; `low_rank` says the same change as
factors, for the hook form.

It works on one block of columns at a time, part of the columns that one head writes through, copied to the CPU in
float64; the bounds depend on the shape alone. It uses only element by element operations and a fixed tree of additions, all rounded as IEEE 754
says; hence its bytes depend on the weight and the operations alone, not on the alignment of the memory, the
number of threads, the BLAS or the device. The result is cast to the weight's dtype once, at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError

BLOCK = 1 << 16  # Numbers in a block: half a megabyte of float64.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODULES = ("attention_output",)


@dataclass(frozen=True, order=True)
class Matrix:
    """The logical name of one matrix: `layer` counts from 0, `module` is a word of the anatomy."""

    layer: int
    module: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.module}"


@runtime_checkable
class Operation(Protocol):
    """What a patch does to one matrix W (out, in), block of columns by block of columns.

    A block is some or all columns of one head; what is done to a column does not depend on its neighbours.
    Operations on one matrix act in the order of the patch, each on what its predecessor left.
    """

    @property
    def weight(self) -> float:
        """Its strength; an operation of weight 0 is left out."""
        ...

    @property
    def matrix(self) -> Matrix:
        """The matrix that it touches."""
        ...

    @property
    def tensor(self) -> Tensor:
        """The tensor that defines it, for artifact and fingerprint."""
        ...

    @property
    def heads(self) -> tuple[int, ...]:
        """The blocks of columns that it touches."""
        ...

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where it does not fit a matrix of this shape whose input is split over `heads`."""
        ...

    def change(self, block: Float[Tensor, "out width"]) -> Float[Tensor, "out width"]:
        """Return what is added to a block, in float64."""
        ...

    def factors(self, block: Float[Tensor, "out width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " out"]]:
        """Return (a, b) with `change(block) == outer(b, a)` and b equal for all blocks."""
        ...

    def scaled(self, scale: float) -> Operation:
        """Return the operation with its weight multiplied."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Return everything but the tensor, for provenance and fingerprint."""
        ...


@dataclass(frozen=True, eq=False)
class ProjectColumns:
    """W[:, columns of `heads`] <- (I - weight v̂ v̂ᵀ) W[:, columns of `heads`] (ThinkEdit, arXiv 2503.22048, Eq. 6).

    Args:
        layer: counts from 0.
        module: `attention_output`.
        heads: query heads, in any order; one operation serves all heads that share the vector.
        vector: v, any norm but 0 and any sign, shape (out,); normalised in float64 when it is used.
        weight: w; 1 removes the component along v, 0 changes nothing.

    Raises:
        SteerError: no head, a head twice, a negative number, an unknown module, a vector that is zero or not finite.
    """

    layer: int
    module: str
    heads: tuple[int, ...]
    vector: Float[Tensor, " out"] = field(repr=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise SteerError(f"the operation names the module {self.module!r}", f"one of {', '.join(MODULES)}")
        if not self.heads:
            raise SteerError(
                f"the operation on {self.matrix} names no head",
                "at least one head",
                "Choose heads with `steer probe heads`",
            )
        if len(set(self.heads)) != len(self.heads):
            raise SteerError(f"the operation on {self.matrix} names a head twice: {list(self.heads)}", "each head once")
        if self.layer < 0 or min(self.heads) < 0:
            raise SteerError(f"the operation names layer {self.layer}, heads {list(self.heads)}", "numbers from 0 on")
        if not math.isfinite(self.weight):
            raise SteerError(f"the weight of the operation on {self.matrix} is {self.weight}", "a finite number")
        vector = self.vector.detach().to("cpu", torch.float32, copy=True)
        if vector.dim() != 1 or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise SteerError(
                f"the direction of {self.matrix} has shape {tuple(vector.shape)}, or is zero or not finite",
                "one finite vector of the model's hidden size that is not zero",
                "Leave this layer out, or collect the direction from more traces",
            )
        object.__setattr__(self, "heads", tuple(sorted(self.heads)))
        object.__setattr__(self, "vector", vector)

    @property
    def matrix(self) -> Matrix:
        """The matrix that it touches."""
        return Matrix(self.layer, self.module)

    @property
    def tensor(self) -> Tensor:
        """The vector, float32 on the CPU."""
        return self.vector

    @cached_property
    def unit(self) -> Float[Tensor, " out"]:
        """v̂ in float64."""
        vector = self.vector.double()
        vector = vector / vector.abs().max()
        return vector / _sum_rows((vector * vector)[:, None]).sqrt()

    def check(self, shape: tuple[int, int], heads: int) -> None:
        """Raise SteerError where it does not fit a matrix (out, in) whose input is split over `heads`."""
        if self.vector.shape[0] != shape[0]:
            raise SteerError(
                f"the direction of {self.matrix} has {self.vector.shape[0]} numbers and the matrix has {shape[0]} rows",
                "a direction made on this model",
            )
        if self.heads[-1] >= heads:
            raise SteerError(f"the patch names head {self.heads[-1]} of layer {self.layer}", f"heads 0 to {heads - 1}")

    def change(self, block: Float[Tensor, "out width"]) -> Float[Tensor, "out width"]:
        """Return -w v̂ (v̂ᵀ block)."""
        along, column = self.factors(block)
        return column[:, None] * along[None, :]

    def factors(self, block: Float[Tensor, "out width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " out"]]:
        """Return (v̂ᵀ block, -w v̂)."""
        unit = self.unit
        return _sum_rows(unit[:, None] * block), -self.weight * unit

    def scaled(self, scale: float) -> ProjectColumns:
        """Return the operation with weight `scale * weight`."""
        return replace(self, weight=scale * self.weight)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the vector."""
        return {
            "operation": "project_columns",
            "layer": self.layer,
            "module": self.module,
            "heads": list(self.heads),
            "weight": self.weight,
        }


def _sum_rows(values: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Sum over rows by a fixed tree of additions, so that the bytes depend on nothing but the values."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        folded = values[:half] + values[half : 2 * half]
        values = torch.cat([folded, values[2 * half :]]) if values.shape[0] % 2 else folded
    return values[0]


@dataclass(frozen=True)
class Block:
    """One block of columns before and after: `exact` in float64, `after` in the weight's dtype on the CPU."""

    columns: slice
    before: Float[Tensor, "out width"]
    exact: Float[Tensor, "out width"]
    after: Float[Tensor, "out width"]


@dataclass(frozen=True)
class Survival:
    """How much of the wanted change is left after the cast; blocks and matrices add up.

    Attributes:
        wanted_square: squared Frobenius norm of the change before the cast.
        actual_square: squared Frobenius norm of the change that the stored numbers show.
        inner: inner product of the two.
    """

    wanted_square: float = 0.0
    actual_square: float = 0.0
    inner: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.wanted_square + other.wanted_square, self.actual_square + other.actual_square, self.inner + other.inner
        )

    @property
    def wanted(self) -> float:
        """Frobenius norm of the wanted change."""
        return math.sqrt(self.wanted_square)

    @property
    def actual(self) -> float:
        """Frobenius norm of the change that was stored."""
        return math.sqrt(self.actual_square)

    @property
    def share(self) -> float | None:
        """`actual / wanted`; None where nothing was wanted."""
        return self.actual / self.wanted if self.wanted else None

    @property
    def cosine(self) -> float | None:
        """Cosine between the wanted and the stored change; None where one of them is zero."""
        return self.inner / (self.wanted * self.actual) if self.wanted and self.actual else None

    @classmethod
    def of(cls, block: Block) -> Survival:
        """Measure one block."""
        wanted, actual = block.exact - block.before, block.after.double() - block.before
        return cls(float((wanted * wanted).sum()), float((actual * actual).sum()), float((wanted * actual).sum()))


def edited_blocks(weight: Float[Tensor, "out in"], operations: Sequence[Operation], head_width: int) -> Iterator[Block]:
    """Carry out `operations` on the blocks of `weight` that they touch, in order of columns.

    Args:
        weight: any dtype of `DTYPES`, any device; it is not changed here.
        operations: all for this one matrix, first to last.
        head_width: columns per head, `in / heads`.

    Yields:
        The touched blocks; every other column keeps its bytes.

    Raises:
        SteerError: the weight's dtype is none of `DTYPES`.
    """
    operations = [operation for operation in operations if operation.weight != 0]
    step = max(1, BLOCK // weight.shape[0])
    for head in sorted({head for operation in operations for head in operation.heads}):
        end = (head + 1) * head_width
        for start in range(head * head_width, end, step):
            columns = slice(start, min(start + step, end))
            before = _wide(weight, columns)
            exact = before
            for operation in operations:
                if head in operation.heads:
                    exact = exact + operation.change(exact)
            yield Block(columns, before, exact, exact.to(weight.dtype))


def edit_(weight: Float[Tensor, "out in"], operations: Sequence[Operation], head_width: int) -> Survival:
    """Write the result of `operations` into `weight`, and say how much of the change survived the cast."""
    survival = Survival()
    for block in edited_blocks(weight, operations, head_width):
        weight[:, block.columns] = block.after.to(weight.device)
        survival += Survival.of(block)
    return survival


def edited(
    weight: Float[Tensor, "out in"], operations: Sequence[Operation], head_width: int
) -> Float[Tensor, "out in"]:
    """Return the weight after `operations`, on its device and in its dtype; `weight` itself is not changed.

    Raises:
        SteerError: the weight's dtype is none of `DTYPES`.
    """
    result = weight.detach().clone(memory_format=torch.contiguous_format)
    edit_(result, operations, head_width)
    return result


def low_rank(
    weight: Float[Tensor, "out in"], operations: Sequence[Operation], head_width: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return (A, B) on the CPU with `B @ A` = what `operations` add to `weight`, before the cast.

    Both are float32, for a float64 weight float64.

    The rank is the number of operations. Where they overlap, row i of A uses the weight that the operations
    before i left, so the sum is the composed change, exactly as `edited` makes it.
    """
    rows = torch.zeros(len(operations), weight.shape[1], dtype=torch.float64)
    columns = torch.zeros(weight.shape[0], len(operations), dtype=torch.float64)
    for head in sorted({head for operation in operations for head in operation.heads}):
        here = slice(head * head_width, (head + 1) * head_width)
        block = _wide(weight, here)
        for index, operation in enumerate(operations):
            if head in operation.heads:
                rows[index, here], columns[:, index] = operation.factors(block)
                block = block + operation.change(block)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return rows.to(dtype), columns.to(dtype)


def _wide(weight: Tensor, columns: slice) -> Tensor:
    if weight.dtype not in DTYPES:
        raise SteerError(
            f"the weight has dtype {weight.dtype}",
            f"one of {', '.join(str(dtype) for dtype in DTYPES)}",
            "Edit the unquantised model",
        )
    return weight.detach()[:, columns].to("cpu", copy=True).contiguous().double()


def tensor_hash(tensor: Tensor) -> str:
    """Return `sha256:…` of the tensor's bytes as a checkpoint stores them (row-major, little-endian)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return "sha256:" + hashlib.sha256(flat.numpy().data).hexdigest()
