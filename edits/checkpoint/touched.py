"""One stored tensor that a patch changes: the matrices in it, where they lie, and which bytes may differ afterwards.

A stored tensor may hold several matrices: the experts of a fused tensor, the halves of a fused gate and up
projection. Seen as (experts, rows, numbers per row), with one expert where it is not fused, what may change of it is
a few boxes [e0, e1, r0, r1, c0, c1]; an undo keeps those and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from steer.anatomy.headers import BYTES, Entry
from steer.anatomy.slots import Matrix, Slot
from steer.operations import Operation, region

FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
Axes = tuple[int, int, int]
Box = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class SlotEdit:
    """What is done to one matrix of a stored tensor.

    Attributes:
        matrix: its logical name.
        slot: where it lies.
        operations: in order.
        head_width: columns per head.
    """

    matrix: Matrix
    slot: Slot
    operations: tuple[Operation, ...]
    head_width: int

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads whose columns may change."""
        return tuple(sorted({head for each in self.operations if each.weight for head in each.heads or ()}))


@dataclass(frozen=True)
class Touched:
    """One stored tensor that will change, or be there for the first time.

    Attributes:
        name: on disk.
        file: shard that it goes into.
        dtype: in the result.
        shape: as stored.
        entry: where its bytes lie before the change; None for zeros.
        edits: of its matrices; none where only the dtype changes.
        created: why it is there although the base lacks it; empty where the base has it.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    entry: Entry | None
    edits: tuple[SlotEdit, ...] = ()
    created: str = ""

    @property
    def size(self) -> int:
        """Bytes in the result."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def heads(self) -> tuple[tuple[Matrix, int], ...]:
        """Heads whose columns may change."""
        return tuple((edit.matrix, head) for edit in self.edits for head in edit.heads)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What is done in it, matrix by matrix."""
        return tuple(operation for edit in self.edits for operation in edit.operations)

    @property
    def head_width(self) -> int:
        """Columns per head of its only matrix; 0 where it holds several or none."""
        return self.edits[0].head_width if len(self.edits) == 1 else 0

    @property
    def label(self) -> str:
        """The matrices in words: `layer 3, expert_down of experts 0, 5`."""
        return ", ".join(named([edit.matrix for edit in self.edits])) or self.created

    @property
    def axes(self) -> Axes:
        """Experts, rows of each, and numbers in a row."""
        if any(edit.slot.expert is not None for edit in self.edits):
            return self.shape[0], (self.shape[1:2] or (1,))[0], math.prod(self.shape[2:])
        return 1, (self.shape or (1,))[0], math.prod(self.shape[1:])

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What may differ from the base afterwards, beside the dtype; none of a tensor that is new."""
        if self.created:
            return ()
        experts, rows, width = self.axes
        found = list(dict.fromkeys(box for edit in self.edits for box in _boxes(edit, self.shape)))
        whole = {(e, e + 1, 0, rows, 0, width) for e in range(experts)}
        return ((0, experts, 0, rows, 0, width),) if whole <= set(found) else tuple(found)

    @property
    def is_new_layout(self) -> bool:
        """Whether its shard needs another header than the base's."""
        return bool(self.created) or self.entry is None or self.entry.dtype != self.dtype


def box_numbers(box: Sequence[int]) -> int:
    """How many numbers lie in a box."""
    return (box[1] - box[0]) * (box[3] - box[2]) * (box[5] - box[4])


def _boxes(edit: SlotEdit, shape: tuple[int, ...]) -> list[Box]:
    """The boxes of one matrix: its region, turned and spread out as the slot stores it."""
    slot, inner = edit.slot, shape if edit.slot.expert is None else shape[1:]
    changed = region(edit.operations, slot.shape(shape), edit.head_width)
    start, _, step = slot.rows or (0, None, 1)
    out = (start + step * changed.rows.start, start + step * (changed.rows.stop - 1) + 1)
    expert = slot.expert or 0
    turned = slot.transposed and len(inner) == 2
    return [
        (expert, expert + 1, part.start, part.stop, *out)
        if turned
        else (expert, expert + 1, *out, part.start, part.stop)
        for part in changed.columns
    ]


def named(matrices: Sequence[Matrix]) -> list[str]:
    """Name matrices, those of one layer's experts together."""
    found = []
    for (layer, module, bias), group in groupby(sorted(matrices), key=lambda m: (m.layer, m.module, m.bias)):
        several = list(group)
        if len(several) == 1 or several[0].expert < 0:
            found += [str(matrix) for matrix in several]
            continue
        numbers = [matrix.expert for matrix in several]
        run = numbers == list(range(numbers[0], numbers[-1] + 1))
        words = f"{numbers[0]} to {numbers[-1]}" if run else ", ".join(map(str, numbers))
        found.append(f"layer {layer}, {module}{' bias' if bias else ''} of experts {words}")
    return found
