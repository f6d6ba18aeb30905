"""Operations from their stored form: the JSON of `as_json` and the tensors beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.identity import known_keys
from steer.operations.elementwise import AddBias, AddDense, AddLowRank, Scale, SetSlice
from steer.operations.operation import Operation
from steer.operations.project import ProjectColumns

Json = Mapping[str, Any]


def _project_out(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    heads = None if stored["heads"] is None else tuple(stored["heads"])
    vector, weight = tensors["vector"], stored["weight"]
    return ProjectColumns(matrix.layer, matrix.module, heads, vector, weight, matrix.expert, matrix.bias)


def _scale(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    heads = None if stored["heads"] is None else tuple(stored["heads"])
    return Scale(matrix, stored["factor"], heads, stored["weight"])


def _add_low_rank(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    return AddLowRank(matrix, tensors["A"], tensors["B"], stored["weight"])


def _add_dense(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    return AddDense(matrix, tensors["delta"], stored["weight"], stored.get("digest"))


def _add_bias(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    return AddBias(matrix.layer, matrix.module, tensors["vector"], stored["weight"], matrix.expert)


def _set_slice(matrix: Matrix, stored: Json, tensors: Mapping[str, Tensor]) -> Operation:
    rows, columns = stored["rows"], stored["columns"]
    return SetSlice(matrix, (rows[0], rows[1]), (columns[0], columns[1]), tensors["values"], stored["weight"])


# Of each operation: its keys beside `operation`, `matrix` and `weight`, the tensors it needs, and how it is made.
KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Matrix, Json, Mapping[str, Tensor]], Operation]]] = {
    "project_out": (("heads",), ("vector",), _project_out),
    "scale": (("heads", "factor"), (), _scale),
    "add_low_rank": ((), ("A", "B"), _add_low_rank),
    "add_dense": (("digest",), ("delta",), _add_dense),
    "add_bias": ((), ("vector",), _add_bias),
    "set_slice": (("rows", "columns"), ("values",), _set_slice),
}


def operation_of(stored: Json, tensors: Mapping[str, Tensor], path: str | Path) -> Operation:
    """Return the operation that `as_json` and `tensors` describe.

    Args:
        stored: as `as_json` made it.
        tensors: by the names of `Operation.tensors`.
        path: the file, for messages.

    Raises:
        SteerError: an operation that this version does not know, or one that lacks a key or a tensor.
    """
    name = str(stored.get("operation"))
    if name not in KNOWN:
        raise SteerError(
            f"{path} holds the operation {name!r}",
            f"one of {', '.join(KNOWN)}",
            "Read it with the version that wrote it",
        )
    keys, needed, make = KNOWN[name]
    wanted = ("operation", "matrix", "weight", *keys)
    known_keys(stored, wanted, f"an operation of {path}")
    missing = [key for key in wanted if key not in stored and key != "digest"]
    missing += [tensor for tensor in needed if tensor not in tensors]
    if missing:
        raise SteerError(
            f"the operation {name} of {path} lacks {', '.join(missing)}",
            f"the keys {', '.join(wanted)} and the tensors {', '.join(needed) or 'none'}",
            "Make the file again",
        )
    return make(Matrix.parse(stored["matrix"]), stored, tensors)
