"""How two checkpoints differ: which tensors, by how much, and of which rank; configuration and other files too.

Nothing is loaded: tensors are read some rows at a time (`edits.checkpoint.rows`), so a model of any size is compared
in the memory of a few blocks, or of one touched tensor where a patch is laid on a side. A tensor is first compared
byte by byte; only one that differs is subtracted (`edits.checkpoint.change`). Tensors are paired by name; where
one side stores as one tensor what the other stores apart, such as experts, matrix by matrix (`edits.checkpoint.pairs`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from edits.checkpoint.change import LIMIT, Change, change_of, same_rows
from edits.checkpoint.compare import OnDisk, on_disk
from edits.checkpoint.others import unequal_files, unequal_settings
from edits.checkpoint.pairs import Pair, pairs_of
from edits.checkpoint.rows import Side, opened
from edits.difference import Difference, Reshaped, TensorDifference, layer_of
from steer.errors import SteerError

Progress = Callable[[int, int], None]


def diff(
    first: OnDisk | str | os.PathLike[str],
    second: OnDisk | str | os.PathLike[str],
    *,
    rank: int = LIMIT,
    progress: Progress | None = None,
) -> Difference:
    """Compare two checkpoints tensor by tensor.

    Args:
        first: a, what the change is relative to: a folder, a hub id, `organism:NAME`, any of them with patches as in
            `MODEL+PATCH@0.5`, or an `OnDisk`.
        second: b, likewise.
        rank: the rank of each difference is counted up to this; 0 leaves it out, which takes about a fifth of the time.
        progress: called with the number of pairs that are done, and of all.

    Raises:
        SteerError: a side is no checkpoint, a patch does not fit it, or the limit of the rank is negative.
    """
    if rank < 0:
        raise SteerError(f"the rank is to be counted up to {rank}", "a limit from 1 on, or 0 for no rank")
    sides = [on_disk(first), on_disk(second)]
    tell = progress or (lambda done, total: None)
    with opened(sides[0]) as a, opened(sides[1]) as b:
        paired = pairs_of(a, b)
        differing, reshaped, same_file, equal = [], [], 0, 0
        for done, pair in enumerate(paired.pairs, 1):
            if not pair.comparable(a, b):
                reshaped.append(Reshaped(pair.name, *pair.stored(a, b)))
            elif _is_one_file(pair, a, b):
                same_file += 1
            elif _is_equal(pair, a, b):
                equal += 1
            else:
                differing.append(_measured(pair, a, b, rank))
            tell(done, len(paired.pairs))
        return Difference(
            _name(first),
            _name(second),
            tensors=len(paired.pairs) + len(paired.only_first) + len(paired.only_second),
            differing=tuple(sorted(differing, key=lambda each: (-each.change.relative, -each.change.norm, each.name))),
            equal=equal,
            same_file=same_file,
            reshaped=tuple(reshaped),
            only_first=paired.only_first,
            only_second=paired.only_second,
            regrouped=paired.regrouped,
            unknown=paired.unknown,
            config=unequal_settings(a.config, b.config),
            files=unequal_files(a.headers, b.headers),
            limit=rank,
            layers=1 + max((layer_of(name) or 0 for name in a.tensors), default=0),
        )


def _name(subject: OnDisk | str | os.PathLike[str]) -> str:
    return str(subject) if isinstance(subject, OnDisk) else str(os.fspath(subject))


def _is_one_file(pair: Pair, a: Side, b: Side) -> bool:
    places = [(a.rows(x).place, b.rows(y).place) for x, y in pair.slots]
    return pair.dtypes(a, b)[0] == pair.dtypes(a, b)[1] and all(x == y is not None for x, y in places)


def _is_equal(pair: Pair, a: Side, b: Side) -> bool:
    return all(same_rows(a.rows(x), b.rows(y)) for x, y in pair.slots)


def _measured(pair: Pair, a: Side, b: Side, rank: int) -> TensorDifference:
    change = Change()
    for x, y in pair.slots:
        change += change_of(a.rows(x), b.rows(y), rank)
    return TensorDifference(pair.name, pair.shape(a, b), pair.dtypes(a, b), change)
