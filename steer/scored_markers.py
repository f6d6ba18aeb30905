"""Markers that enter a score: texts whose tokens are looked at, each with its weight in the sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steer.errors import SteerError
from steer.identity import known_keys


@dataclass(frozen=True)
class ScoredMarker:
    """A marker that enters the score.

    Attributes:
        text: as it was named; several texts between commas count as one marker.
        sign: what its score is multiplied by in the sum.
        marked: M, tokens that are the marker (its last token, where it is written with several).
        variants: token ids of every way in which the tokenizer writes it; empty where no tokenizer was asked.
        written: what each variant decodes to.
    """

    text: str
    sign: float
    marked: int
    variants: tuple[tuple[int, ...], ...] = ()
    written: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ScoredMarker:
        """Read plain data.

        Raises:
            SteerError: unknown or missing keys, or values of another kind.
        """
        names = ("text", "sign", "marked", "variants", "written")
        known_keys(stored, names, "a marker of the expert scores")
        if not _readable(stored, names):
            raise SteerError(
                f"a marker of the expert scores reads {stored!r}",
                "a text, its weight, how often it stands, lists of token ids and what each writes",
                "Make the file again",
            )
        variants = tuple(tuple(ids) for ids in stored["variants"])
        return cls(stored["text"], stored["sign"], stored["marked"], variants, tuple(stored["written"]))


def _readable(stored: Mapping[str, Any], names: Iterable[str]) -> bool:
    if set(stored) != set(names):
        return False
    variants, written = stored["variants"], stored["written"]
    return (
        isinstance(stored["text"], str)
        and isinstance(stored["sign"], int | float)
        and type(stored["marked"]) is int
        and isinstance(variants, list)
        and all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in variants)
        and isinstance(written, list)
        and all(isinstance(text, str) for text in written)
    )


def formula(markers: Iterable[tuple[str, float]]) -> str:
    """Return a signed sum in words; a weight of one is not written."""
    told = ""
    for text, sign in markers:
        weight = "" if abs(sign) == 1 else f"{abs(sign):g} "
        join = (" - " if sign < 0 else " + ") if told else ("-" if sign < 0 else "")
        told += f"{join}{weight}{text}"
    return told or "two sets of tokens"
