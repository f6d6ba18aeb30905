"""Programs: the writes at one place, in order, made ready for a device.

The formulas are `steer.interventions.prepared` and, at `head_out`, `steer.operations.low_rank`; routers have programs of
their own, `steer.router_writes`. A program adds up what
they return in float32 (float64 in a float64 model); the hook adds the sum to the activation and casts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer.anatomy.modules import plain_weight
from steer.errors import SteerError
from steer.interventions import Add, Change, Intervention, ProjectOut, prepared
from steer.operations import ProjectColumns, low_rank
from steer.report import Counter, Tick, Unmet


@dataclass(frozen=True)
class Write:
    """One intervention as it acts in one layer: the request's coefficient, and where it is counted.

    `unmet` takes note of forced choices of experts that did not hold; None where nothing is forced.
    """

    intervention: Intervention
    coefficient: float
    counter: Counter
    unmet: Unmet | None = None

    @property
    def phase(self) -> str:
        """When it acts."""
        return self.intervention.phase


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which additions to activations of this dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Step:
    """Either a constant vector, or a function of the activation."""

    phase: str
    constant: Tensor | None
    change: Change | None


class Program:
    """The writes at one site of one layer, but `head_out`.

    Args:
        layer: counts from 0.
        writes: in order.
    """

    def __init__(self, layer: int, writes: Sequence[Write]) -> None:
        self.layer = layer
        self.writes = tuple(writes)
        self.counters = tuple({id(write.counter): write.counter for write in writes}.values())
        self.is_constant = all(isinstance(write.intervention, Add) for write in writes)
        self._ready: dict[tuple[torch.dtype, torch.device], list[_Step]] = {}

    def write(self, value: Float[Tensor, "batch token *width"], tick: Tick) -> Float[Tensor, "batch token *width"]:
        """Return `value` after all writes, in its own dtype."""
        return (value + self.added(value, tick)).to(value.dtype)

    def added(self, value: Float[Tensor, "batch token *width"], tick: Tick) -> Tensor:
        """Return what the writes add, each seeing what its predecessors added; broadcasts against `value`."""
        for counter in self.counters:
            counter.touch(tick)
        steps = self._ready.get((value.dtype, value.device))
        if steps is None:
            steps = self._ready[value.dtype, value.device] = self._prepare(value)
        total: Tensor | None = None
        for step in steps:
            if step.constant is not None:
                part = step.constant
                if step.phase != "all":
                    part = part * tick.weights(step.phase, value, part.dtype)
            else:
                assert step.change is not None
                part = step.change(value if total is None else value + total)
                if step.phase != "all":
                    part = torch.where(tick.mask(step.phase, value), part, 0.0)
            total = part if total is None else total + part
        assert total is not None, "a program has at least one write"
        return total

    def _prepare(self, value: Tensor) -> list[_Step]:
        steps: list[_Step] = []
        for write in self.writes:
            change = prepared(write.intervention, self.layer, write.coefficient, value.dtype, value.device)
            if not isinstance(write.intervention, Add):
                steps.append(_Step(write.phase, None, change))
                continue
            width = write.intervention.direction.width
            constant = change(torch.zeros(width, dtype=wide(value.dtype), device=value.device)).clone()
            before = steps[-1] if steps else None
            if before is not None and before.constant is not None and before.phase == write.phase:
                before.constant = before.constant + constant
            else:
                steps.append(_Step(write.phase, constant, None))
        return steps


class HeadProgram:
    """All `ProjectOut` at `head_out` of one layer: `attn_raw += (edited W_S - W_S) z_S`, as low-rank factors.

    Args:
        layer: counts from 0.
        writes: in order; those of one phase are composed as the patch composes them.
        projection: the attention output projection, whose present weight counts.
        head_width: columns per head.

    Raises:
        SteerError: writes of different phases share a head, so that no single edited weight says what they do; the
            weight is quantised.
    """

    def __init__(self, layer: int, writes: Sequence[Write], projection: nn.Module, head_width: int) -> None:
        self.layer, self.projection, self.head_width = layer, projection, head_width
        self.counters = tuple({id(write.counter): write.counter for write in writes}.values())
        self.operations: dict[str, list[ProjectColumns]] = {}
        for write in writes:
            self.operations.setdefault(write.phase, []).append(_operation(layer, write))
        _refuse_shared_heads(layer, self.operations)
        self._key: tuple[object, ...] = ()
        self._factors: list[tuple[str, Tensor, Tensor]] = []

    def added(self, z: Float[Tensor, "batch token in"], tick: Tick) -> Float[Tensor, "batch token out"]:
        """Return what is added to `attn_raw`."""
        for counter in self.counters:
            counter.touch(tick)
        weight = self.projection.weight
        assert isinstance(weight, Tensor)
        key = (weight.data_ptr(), weight._version, z.device, z.dtype)
        if key != self._key:  # The weight may have been patched since the context was entered.
            self._factors, self._key = self._make(z), key
        total: Tensor | None = None
        for phase, rows, columns in self._factors:
            part = (z.to(rows.dtype) @ rows) @ columns
            if phase != "all":
                part = part * tick.weights(phase, z, part.dtype)
            total = part if total is None else total + part
        assert total is not None, "a program has at least one write"
        return total

    def _make(self, z: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        found = []
        with plain_weight(self.projection, f"the attention output projection of layer {self.layer}") as weight:
            for phase, operations in self.operations.items():
                rows, columns = low_rank(weight, operations, self.head_width)
                found.append((phase, rows.T.to(z.device, wide(z.dtype)), columns.T.to(z.device, wide(z.dtype))))
        return found


def _operation(layer: int, write: Write) -> ProjectColumns:
    intervention = write.intervention
    assert isinstance(intervention, ProjectOut) and intervention.heads is not None, (
        "nothing else is allowed at head_out"
    )
    heads = tuple(head for where, head in intervention.heads if where == layer)
    return ProjectColumns(
        layer, "attention_output", heads, intervention.direction[layer], write.coefficient * intervention.weight
    )


def _refuse_shared_heads(layer: int, operations: dict[str, list[ProjectColumns]]) -> None:
    owner: dict[int, str] = {}
    for phase, found in operations.items():
        for head in sorted({head for operation in found for head in operation.heads or ()}):
            if head in owner:
                raise SteerError(
                    f"head {head} of layer {layer} is edited at head_out in phase {owner[head]!r} and in phase {phase!r}",
                    "one phase for all edits of a head, since their composition is one edited weight",
                    "Use one phase for both, or different heads",
                )
            owner[head] = phase
