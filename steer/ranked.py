"""Choosing among scored parts of a model, each a pair of numbers (a layer and a head or an expert in it)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from steer.errors import SteerError

Place = tuple[int, int]


def check_count(n: int, scored: int, what: str) -> int:
    """Return n.

    Raises:
        SteerError: it is not between 1 and the number of scored parts; `what` names them, in the plural.
    """
    if not 1 <= n <= scored:
        raise SteerError(
            f"{n} {what} were asked for and {scored} are scored", f"1 to {scored}", "Ask for another number"
        )
    return n


def drawn(scored: Iterable[Place], n: int, seed: int, exclude: Iterable[Place], what: str) -> tuple[Place, ...]:
    """Return n places drawn evenly without the excluded ones, sorted.

    Raises:
        SteerError: fewer than n are left.
    """
    without = set(exclude)
    left = sorted(place for place in scored if place not in without)
    if not 1 <= n <= len(left):
        raise SteerError(
            f"{n} random {what} were asked for and {len(left)} are left to draw from",
            f"1 to {len(left)}",
            "Ask for fewer, or exclude fewer",
        )
    chosen = np.random.default_rng(seed).choice(len(left), size=n, replace=False)
    return tuple(left[index] for index in sorted(chosen.tolist()))


def html(rows: Sequence[Mapping[str, object]], what: str, shown: int = 10) -> str:
    """Return the first rows as a table for a notebook, and how many more there are."""
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows[:shown]
    )
    more = f"<p>{len(rows) - shown} more {what}.</p>" if len(rows) > shown else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
