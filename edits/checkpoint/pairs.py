"""Which matrix of one checkpoint is compared with which of the other.

Tensors of one name are one pair; what has three axes, such as fused experts, is compared slice by slice. Of the rest,
one side may store apart what the other stores as one tensor (experts; gate and up), or under another prefix; those are
paired where the anatomies say that they are the same parameter of the loaded model, and named as the side with the
smaller parts names them. What then is left over is only on one side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from edits.checkpoint.rows import Side
from steer.anatomy.headers import Entry
from steer.anatomy.resolve import resolve
from steer.anatomy.slots import Matrix, Slot
from steer.errors import SteerError


@dataclass(frozen=True)
class Pair:
    """Matrices of both sides that belong together; they share a name.

    Attributes:
        name: on disk.
        slots: where each lies in the first and in the second; several for a tensor with three axes.
        of_first: whether the name is the first side's; both have it where tensors are paired by name.
    """

    name: str
    slots: tuple[tuple[Slot, Slot], ...]
    of_first: bool = True

    def stored(self, a: Side, b: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the tensors that hold it."""
        x, y = self.slots[0]
        return a.tensors[x.name].shape, b.tensors[y.name].shape

    def shape(self, a: Side, b: Side) -> tuple[int, ...]:
        """Shape of the tensor that has the name."""
        return self.stored(a, b)[0 if self.of_first else 1]

    def dtypes(self, a: Side, b: Side) -> tuple[str, str]:
        """Dtypes of both sides."""
        x, y = self.slots[0]
        return a.tensors[x.name].dtype, b.tensors[y.name].dtype

    def comparable(self, a: Side, b: Side) -> bool:
        """Whether the shapes allow a subtraction."""
        x, y = self.slots[0]
        if x.name == y.name and self.stored(a, b)[0] != self.stored(a, b)[1]:
            return False
        return a.rows(x).shape == b.rows(y).shape


@dataclass(frozen=True)
class Paired:
    """All pairs, in order of name, and what has no partner.

    Attributes:
        pairs: to be compared.
        only_first, only_second: names without a partner, or with one for a part of them only.
        regrouped: how many pairs lie in tensors of different names.
        unknown: why tensors of different names could not be paired; empty where they could, or where there are none.
    """

    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    regrouped: int = 0
    unknown: str = ""


def pairs_of(a: Side, b: Side) -> Paired:
    """Pair the tensors of two checkpoints."""
    first, second = a.tensors, b.tensors
    pairs = [_whole(Slot(name), Slot(name), first[name], second[name]) for name in first if name in second]
    left = [name for name in first if name not in second], [name for name in second if name not in first]
    moved: list[Pair] = []
    unknown = ""
    if all(left):
        try:
            moved = _by_parameter(a, b, _in_memory(a, left[0]), _in_memory(b, left[1]))
        except SteerError as error:
            unknown = f"paired by name alone, since {error.found}"
    covered = _covered(moved, a, b)
    return Paired(
        tuple(sorted([*pairs, *moved], key=lambda pair: pair.name)),
        tuple(sorted(name for name in left[0] if name not in covered)),
        tuple(sorted(name for name in left[1] if name not in covered)),
        len(moved),
        unknown,
    )


def _whole(x: Slot, y: Slot, first: Entry, second: Entry) -> Pair:
    """Pair two tensors, slice by slice where both have three axes."""
    count = first.shape[0] if len(first.shape) == 3 and first.shape[1] > 1 else None
    if count is None or len(second.shape) != 3 or second.shape[0] != count:
        return Pair(x.name, ((x, y),))
    return Pair(x.name, tuple((replace(x, expert=expert), replace(y, expert=expert)) for expert in range(count)))


def _in_memory(side: Side, names: Iterable[str]) -> dict[str, Slot]:
    """Where some tensors lie in the loaded model; those that the anatomy does not know are left out.

    Raises:
        SteerError: there is no anatomy for the family.
    """
    anatomy = resolve(side.headers.config, side.headers.shapes, side.record)
    found = {}
    for name in names:
        with suppress(SteerError):
            found[name] = anatomy.in_memory(Matrix(-1, name))
    return found


def _by_parameter(a: Side, b: Side, first: Mapping[str, Slot], second: Mapping[str, Slot]) -> list[Pair]:
    """Pair tensors that are the same part of a parameter, or one of them a part of the other."""
    by_parameter: dict[str, list[str]] = {}
    for name, slot in second.items():
        by_parameter.setdefault(slot.name, []).append(name)
    found = []
    for x, slot in first.items():
        for y in by_parameter.get(slot.name, []):
            if (place := _within(slot, second[y], y)) is not None:
                found.append(_whole(Slot(x), place, a.tensors[x], b.tensors[y]))
            elif (place := _within(second[y], slot, x)) is not None:
                found.append(Pair(y, ((place, Slot(y)),), of_first=False))
    return found


def _within(part: Slot, whole: Slot, name: str) -> Slot | None:
    """Where a part of a parameter lies in the stored tensor `name`, which is another part; None if it is not inside."""
    if whole.expert not in (None, part.expert) or whole.rows not in (None, part.rows):
        return None
    expert = part.expert if whole.expert is None else None
    rows = part.rows if whole.rows is None else None
    return Slot(name, expert, part.transposed != whole.transposed, rows)


def _covered(pairs: Iterable[Pair], a: Side, b: Side) -> set[str]:
    """Names of tensors that the pairs hold from end to end."""
    numbers: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for pair in pairs:
        for x, y in pair.slots:
            for side, slot in ((a, x), (b, y)):
                stored = side.tensors[slot.name].shape
                sizes[slot.name] = math.prod(stored)
                numbers[slot.name] += math.prod(slot.shape(stored))
    return {name for name, size in sizes.items() if numbers[name] >= size}
