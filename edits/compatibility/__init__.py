"""Can these weights be added? Shapes, rotation, vocabulary, ancestor: what would garble the output, before it does."""

from __future__ import annotations

import os
from collections.abc import Callable

from edits.compatibility.report import Compatibility, Row, Verdict
from edits.compatibility.settings import setting_rows
from edits.compatibility.tokens import token_rows
from edits.compatibility.weights import ancestor_row, shape_rows
from edits.donors import Adapter, Checkpoint, Donor, donor
from steer.anatomy.slots import Matrix
from steer.errors import SteerError

__all__ = ["Compatibility", "Row", "Verdict", "compatibility"]


def compatibility(
    base: str | os.PathLike[str] | Donor,
    *donors: str | os.PathLike[str] | Donor,
    weights: bool = True,
    takes: Callable[[Matrix], bool] | None = None,
) -> Compatibility:
    """Hold donors against a base: configurations, tokenizers, tensors, and whether they have a common ancestor.

    Args:
        base: a checkpoint: a hub id, a folder, `organism:NAME`, `MODEL+ADAPTER`.
        donors: checkpoints, adapters, or vectors, each of which is asked about its checkpoints.
        weights: sample numbers to look for a common ancestor; False reads headers and small files alone.
        takes: which tensors are to be added; names and shapes of others may differ. None: all.

    Returns:
        The report; `.require()` raises where something says stop.

    Raises:
        SteerError: there is no such model, or the base is no whole model.
    """
    whole = donor(base).checkpoints
    if not whole:
        raise SteerError(f"{donor(base).label} is an adapter by itself", "a whole model as the base", "Name its model")
    rows: list[Row] = []
    seen = {whole[0].headers.folder.resolve()}
    for each in map(donor, donors):
        if isinstance(each, Adapter):
            rows.append(_adapter_row(each, whole[0]))
        for found in each.checkpoints:
            if found.headers.folder.resolve() not in seen:
                seen.add(found.headers.folder.resolve())
                rows += _rows(found, whole[0], weights, takes or (lambda matrix: True))
    return Compatibility(whole[0].label, tuple(rows))


def _rows(found: Checkpoint, base: Checkpoint, weights: bool, takes: Callable[[Matrix], bool]) -> list[Row]:
    ancestor = ancestor_row(found, base) if weights else None
    return [
        *setting_rows(found.label, found.headers.config, base.headers.config),
        *token_rows(found.label, found.headers, base.headers),
        *shape_rows(found, base, takes),
        *([] if ancestor is None else [ancestor]),
    ]


def _adapter_row(adapter: Adapter, base: Checkpoint) -> Row:
    try:
        matched = adapter.on(base)
    except SteerError as error:
        return Row("adapter", adapter.label, str(error.found), str(error.expected), "stop", "its targets are not there")
    count = f"{len(matched.operations)} matrices"
    return Row("adapter", adapter.label, count, count, "ok")
