"""Tables: what `.frame()` of every result returns; pandas belongs to an extra and is asked for only then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError

if TYPE_CHECKING:
    import pandas


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """Return rows as a pandas table.

    Args:
        rows: mappings from column to value; a column that a row lacks is missing there.
        columns: all of them, in order, so that no rows still make a table.

    Raises:
        SteerError: pandas is not installed.
    """
    try:
        library = import_module("pandas")
    except ModuleNotFoundError as error:
        raise SteerError(
            "pandas is not installed", "the extra `notebook`", "Install it: pip install 'reasoning-steer[notebook]'"
        ) from error
    made: pandas.DataFrame = library.DataFrame([dict(row) for row in rows], columns=list(columns))
    return made
