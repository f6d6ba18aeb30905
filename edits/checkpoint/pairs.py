"""Which matrix of one checkpoint is compared with which of the other.

Tensors of one name are one pair; what has three axes, such as fused experts, is compared slice by slice. Of the rest,
one side may store apart what the other stores as one tensor (experts; gate and up), or under another prefix; those are
paired where the anatomies say that they are the same parameter of the loaded model, and named as the side with the
smaller parts names them. What then is left over is only on one side.
"""

from __future__ import annotations

from dataclasses import dataclass

from edits.checkpoint.rows import Side
from steer.anatomy.headers import Entry
from steer.anatomy.slots import Slot


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
        return a.headers.tensors[x.name].shape, b.headers.tensors[y.name].shape

    def shape(self, a: Side, b: Side) -> tuple[int, ...]:
        """Shape of the tensor that has the name."""
        return self.stored(a, b)[0 if self.of_first else 1]

    def dtypes(self, a: Side, b: Side) -> tuple[str, str]:
        """Dtypes of both sides."""
        x, y = self.slots[0]
        return a.headers.tensors[x.name].dtype, b.headers.tensors[y.name].dtype

    def comparable(self, a: Side, b: Side) -> bool:
        """Whether the shapes allow a subtraction."""
        if len(self.slots) > 1 and self.stored(a, b)[0] != self.stored(a, b)[1]:
            return False
        return all(a.rows(x).shape == b.rows(y).shape for x, y in self.slots[:1])


@dataclass(frozen=True)
class Paired:
    """All pairs, in order of name, and what has no partner.

    Attributes:
        pairs: to be compared.
        only_first, only_second: names without a partner.
        regrouped: how many pairs lie in tensors of different names.
    """

    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    regrouped: int = 0


def pairs_of(a: Side, b: Side) -> Paired:
    """Pair the tensors of two checkpoints."""
    first, second = a.headers.tensors, b.headers.tensors
    pairs = [_by_name(name, first[name], second[name]) for name in first if name in second]
    only_first = tuple(sorted(name for name in first if name not in second))
    only_second = tuple(sorted(name for name in second if name not in first))
    return Paired(tuple(sorted(pairs, key=lambda pair: pair.name)), only_first, only_second)


def _by_name(name: str, first: Entry, second: Entry) -> Pair:
    count = first.shape[0] if len(first.shape) == 3 and first.shape[1] > 1 else None
    if count is None or first.shape != second.shape:
        return Pair(name, ((Slot(name), Slot(name)),))
    return Pair(name, tuple((Slot(name, expert), Slot(name, expert)) for expert in range(count)))
