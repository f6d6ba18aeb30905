"""Patch: operations on named matrices of a model, and what they expect to find.

A patch says what it wants in logical names (layer 12, attention_output, heads 3 and 5), never in names of a
family or of a file. It runs in memory (`patch.on`), becomes a checkpoint (`patch.plan(folder).apply(out)`), and
has a hook form (`patch.steering`). The arithmetic is in `steer.operations`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.operations import DTYPES, Matrix, Operation, ProjectColumns, Survival, edit_, edited, low_rank, tensor_hash

if TYPE_CHECKING:
    from edits.checkpoint.plan import Plan
    from steer.identity import ModelIdentity
    from steer.model import SteerableModel
    from steer.steering import Steering

__all__ = ["Matrix", "Operation", "Patch", "ProjectColumns", "edited", "low_rank"]


@dataclass(frozen=True, eq=False)
class Patch:
    """Operations on named matrices, and what they expect to find.

    Args:
        operations: at least one; those on one matrix act in this order.
        model: the model that it was made on; another shape is refused, None fits whatever has the matrices.
        expects: hash of a matrix's bytes before the patch (`tensor_hash`), where known; see `edits.checkpoint.pin`.
        provenance: how it was made; JSON values only.

    Raises:
        SteerError: there is no operation.
    """

    operations: tuple[Operation, ...]
    model: ModelIdentity | None = None
    expects: Mapping[Matrix, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.operations:
            raise SteerError("the patch has no operation, so it would leave the model as it is", "at least one head or matrix")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        heads = len({(operation.matrix, head) for operation in self.operations for head in operation.heads})
        return f"patch {self.fingerprint[:12]}: {len(self.matrices)} matrices, {heads} heads, {len(self.operations)} operations"

    @property
    def matrices(self) -> dict[Matrix, tuple[Operation, ...]]:
        """The operations of every touched matrix, matrices in order of layer."""
        found: dict[Matrix, tuple[Operation, ...]] = {}
        for operation in self.operations:
            found[operation.matrix] = (*found.get(operation.matrix, ()), operation)
        return dict(sorted(found.items()))

    @property
    def fingerprint(self) -> str:
        """Hash of what the patch does: the operations and their tensors, not where they came from."""
        digest = hashlib.sha256()
        for operations in self.matrices.values():
            for operation in operations:
                digest.update(json.dumps(operation.as_json(), sort_keys=True, separators=(",", ":")).encode())
                digest.update(tensor_hash(operation.tensor).encode())
        return digest.hexdigest()

    def scaled(self, scale: float) -> Patch:
        """Return the patch with the weight of every operation multiplied by `scale`."""
        return replace(self, operations=tuple(operation.scaled(scale) for operation in self.operations))

    def plan(self, folder: str | Path) -> Plan:
        """Say what the patch would do to the checkpoint in `folder`; headers only, nothing is written.

        `edits` sits above `steer`, so its room is looked up by name when it is needed.
        """
        made: Plan = importlib.import_module("edits.checkpoint.plan").plan(self, folder)
        return made

    @contextmanager
    def on(self, model: SteerableModel, scale: float = 1.0) -> Iterator[dict[Matrix, Survival]]:
        """Patch a loaded model while the context is open; afterwards every byte is as before.

        Contexts may be nested and may end in any order: at every moment the weights are the original ones after
        the operations of all open contexts, in the order in which they were opened, cast once.

        Args:
            model: its touched weights must be in memory, unquantised.
            scale: multiplies the weight of every operation; 0 leaves every byte as it is.

        Yields:
            How much of the wanted change survived the cast, for every matrix.

        Raises:
            SteerError: another model's shape; a weight that is quantised or not in memory.
        """
        if self.model is not None:
            importlib.import_module("steer.identity").check_same(model.identity, self.model, "patch")
        heads = model.anatomy.heads
        found = {matrix: model.parameter(matrix.module, matrix.layer) for matrix in self.matrices}
        scaled = self.scaled(scale).matrices
        for matrix, parameter in found.items():
            _check_parameter(matrix, parameter, heads)
            for operation in scaled[matrix]:
                operation.check((parameter.shape[0], parameter.shape[1]), heads)
        with ExitStack() as stack:
            yield {matrix: stack.enter_context(_held(found[matrix], operations, heads)) for matrix, operations in scaled.items()}


def _check_parameter(matrix: Matrix, parameter: Tensor, heads: int) -> None:
    remedy = "Use its hook form, `patch.steering()`, or load the model unquantised and in memory"
    if parameter.device.type == "meta":
        raise SteerError(f"the weight of {matrix} is offloaded, its bytes are not in memory", "a weight in memory", remedy)
    if parameter.dtype not in DTYPES or parameter.dim() != 2 or type(parameter.data) is not Tensor:
        raise SteerError(
            f"the weight of {matrix} is a {type(parameter).__name__} of dtype {parameter.dtype}, shape {tuple(parameter.shape)}: quantised or sharded",
            "a plain matrix of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES),
            remedy,
        )
    if parameter.shape[1] % heads:
        raise SteerError(f"{matrix} has {parameter.shape[1]} inputs for {heads} heads", "a whole number of columns per head")


@dataclass
class _Held:
    """One parameter that open contexts have patched: its original blocks, and the operations in force."""

    parameter: Tensor
    head_width: int
    originals: dict[int, Tensor] = field(default_factory=dict)
    open: list[tuple[Operation, ...]] = field(default_factory=list)

    def columns(self, head: int) -> slice:
        return slice(head * self.head_width, (head + 1) * self.head_width)

    def rewrite(self) -> Survival:
        """Put the original blocks back, then carry out everything that is in force."""
        weight = self.parameter.detach()
        for head, block in self.originals.items():
            weight[:, self.columns(head)] = block.to(weight.device)
        return edit_(weight, [operation for entry in self.open for operation in entry], self.head_width)


_HELD: dict[int, _Held] = {}


@contextmanager
def _held(parameter: Tensor, operations: tuple[Operation, ...], heads: int) -> Iterator[Survival]:
    held = _HELD.get(id(parameter)) or _Held(parameter, parameter.shape[1] // heads)
    for head in sorted({head for operation in operations for head in operation.heads} - held.originals.keys()):
        held.originals[head] = parameter.detach()[:, held.columns(head)].clone()
    _HELD[id(parameter)] = held
    held.open.append(operations)
    try:
        yield held.rewrite()
    finally:
        del held.open[next(index for index, entry in enumerate(held.open) if entry is operations)]
        held.rewrite()
        if not held.open:
            del _HELD[id(parameter)]
