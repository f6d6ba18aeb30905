"""A patch on a loaded model: every matrix found and checked before the first one is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from steer import parameters
from steer.anatomy.slots import Matrix
from steer.held import Edit, held
from steer.operations import Operation, Survival
from steer.parameters import Place
from steer.writers import check_heads

if TYPE_CHECKING:
    from steer.model import SteerableModel


@contextmanager
def patched(
    model: SteerableModel, operations: Mapping[Matrix, tuple[Operation, ...]]
) -> Iterator[dict[Matrix, Survival]]:
    """Carry out operations on a loaded model while the context is open; see `steer.patches.Patch.on`.

    Args:
        model: the model.
        operations: of every matrix, in order.

    Yields:
        How much of the wanted change survived the cast, for every matrix, of all open contexts together.

    Raises:
        SteerError: a matrix is not there, cannot be changed in memory, or does not fit its operations.
    """
    places = {matrix: parameters.place(model, matrix) for matrix in operations}
    for matrix, where in places.items():
        _check(model, matrix, where, operations[matrix])
    parameters.check_shared(model, places, operations)
    with ExitStack() as stack:
        changes: dict[int, tuple[Tensor, list[Edit]]] = {}
        owner: dict[Matrix, int] = {}
        for matrix, acting in operations.items():
            acting = tuple(operation for operation in acting if operation.weight)
            if not acting:
                continue
            where = places[matrix]
            if parameters.is_absent(where):
                stack.enter_context(parameters.grown(where))
            parameter = where.parameter
            assert parameter is not None
            width = where.slot.shape(tuple(parameter.shape))[1] // model.anatomy.heads
            changes.setdefault(id(parameter), (parameter, []))[1].append(Edit(where.slot, acting, width))
            owner[matrix] = id(parameter)
        survived = {key: stack.enter_context(held(*change)) for key, change in changes.items()}
        yield {
            matrix: survived[owner[matrix]][where.slot] if matrix in owner else Survival()
            for matrix, where in places.items()
        }


def _check(model: SteerableModel, matrix: Matrix, where: Place, operations: tuple[Operation, ...]) -> None:
    parameter = where.parameter
    if parameter is None:
        weight = parameters.beside(where)
        parameters.check(matrix, weight)
        shape = (weight.shape[0], 1)
    else:
        parameters.check(matrix, parameter)
        shape = where.slot.shape(tuple(parameter.shape))
    for operation in operations:
        check_heads(model.anatomy, matrix, operation.heads)
        operation.check(shape, model.anatomy.heads)
