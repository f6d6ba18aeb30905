"""Markers that enter a score: texts whose tokens are looked at, each with its weight in the sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
        """Read plain data; unknown keys are refused."""
        known_keys(stored, ("text", "sign", "marked", "variants", "written"), "a marker of the expert scores")
        variants = tuple(tuple(ids) for ids in stored["variants"])
        return cls(stored["text"], stored["sign"], stored["marked"], variants, tuple(stored["written"]))


def formula(markers: Iterable[tuple[str, float]]) -> str:
    """Return a signed sum in words; a weight of one is not written."""
    told = ""
    for text, sign in markers:
        weight = "" if abs(sign) == 1 else f"{abs(sign):g} "
        join = (" - " if sign < 0 else " + ") if told else ("-" if sign < 0 else "")
        told += f"{join}{weight}{text}"
    return told or "two sets of tokens"
