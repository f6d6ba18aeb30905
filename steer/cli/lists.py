"""Lists on the command line: an option may be repeated, and names and numbers may stand between commas."""

from __future__ import annotations

import re
from collections.abc import Sequence

from steer.errors import SteerError


def words(given: Sequence[str] | None) -> list[str]:
    """Return names: `["a,b", "c"]` is a, b, c."""
    return [word for text in given or [] for word in text.split(",") if word]


def numbers(given: Sequence[str] | None, what: str) -> list[int] | None:
    """Return numbers and ranges, increasing: `["0-2,7"]` is 0, 1, 2, 7; None where nothing was given.

    Raises:
        SteerError: something is neither.
    """
    if not given:
        return None
    found: set[int] = set()
    for word in words(given):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise SteerError(f"{word!r} is not a number or a range of {what}", f"{what} such as 3, or 0-5, or 0-5,9")
        found.update(range(first, last + 1))
    return sorted(found)
