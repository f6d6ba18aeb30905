"""Which parameter of a loaded model a logical name means, and whether its numbers can be changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError
from steer.operations import DTYPES

if TYPE_CHECKING:
    from steer.model import SteerableModel

REMEDY = "Use its hook form, `patch.steering()`, or load the model unquantised and in memory"


def find(model: SteerableModel, matrix: Matrix) -> tuple[nn.Parameter, Slot]:
    """Return the parameter that a matrix lies in, and where.

    Raises:
        SteerError: the model has no such matrix.
    """
    if matrix.module in ("attention_output", "mlp_output") and not matrix.bias:
        parameter = model.parameter(matrix.module, matrix.layer)
        return parameter, Slot(f"{matrix.layer}.{matrix.module}")
    if matrix.module in ("embedding", "head"):
        parameter = model.hf.get_submodule(getattr(model.anatomy.record.model, matrix.module)).weight
        assert isinstance(parameter, nn.Parameter)
        return parameter, Slot(matrix.module, transposed=matrix.module == "embedding")
    raise SteerError(f"{matrix} cannot be found in a loaded model", "a matrix of this version", "Use the checkpoint")


def check(matrix: Matrix, parameter: Tensor) -> None:
    """Refuse a weight whose numbers are not there to be changed.

    Raises:
        SteerError: it is offloaded, quantised, sharded over devices, or not of floating point.
    """
    if parameter.device.type == "meta":
        raise SteerError(
            f"the weight of {matrix} is offloaded, its bytes are not in memory", "a weight in memory", REMEDY
        )
    if parameter.dtype not in DTYPES or type(parameter.data) is not Tensor:
        raise SteerError(
            f"the weight of {matrix} is a {type(parameter).__name__} of dtype {parameter.dtype}, shape {tuple(parameter.shape)}: quantised or sharded",
            "a plain matrix of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES),
            REMEDY,
        )
