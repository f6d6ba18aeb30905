"""Lists of heads as papers and repositories print them: `[(21, 2), (17, 7)]`, layer first, both counted from 0.

ThinkEdit (arXiv 2503.22048) hard-codes such lists, best first, in the file that edits its models; other programs write
`21:2 17:7` or `[[21, 2], [17, 7]]`. All of these are read; the first is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from steer.errors import SteerError

Head = tuple[int, int]
NAME_LIMIT = 255
"""Longest name of a file that systems look for without an error of their own."""
_PAIR = re.compile(r"(\d+)\s*[,:]\s*(\d+)")
_BETWEEN = re.compile(r"[\s,;\[\]()]*")


def parse_heads(text: str, noun: str = "head") -> tuple[Head, ...]:
    """Return the heads of a list in its order; or the experts, where messages shall call them so.

    Raises:
        SteerError: something else than pairs of whole numbers stands there, or a head stands there twice.
    """
    found = [(int(layer), int(head)) for layer, head in _PAIR.findall(text)]
    rest = _PAIR.sub("", text)
    if not found or not _BETWEEN.fullmatch(rest):
        raise SteerError(
            f"the list of {noun}s {text.strip()[:60]!r} cannot be read",
            f"pairs of layer and {noun}",
            "For example [(21, 2), (17, 7)] or 21:2",
        )
    twice = sorted({head for head in found if found.count(head) > 1})
    if twice:
        raise SteerError(f"the list names the {noun} {twice[0]} twice", f"each {noun} once")
    return tuple(found)


def read_heads(text_or_file: str, noun: str = "head") -> tuple[Head, ...]:
    """Return the heads of a list, or of the file of that name; errors as `parse_heads`."""
    if _PAIR.search(text_or_file):
        return parse_heads(text_or_file, noun)
    if len(text_or_file) > NAME_LIMIT or not Path(text_or_file).is_file():
        raise SteerError(
            f"{text_or_file[:60]!r} is neither a list of {noun}s nor a file", "such as 12:3, or the name of a text file"
        )
    # What is no text is no list either.
    return parse_heads(Path(text_or_file).read_bytes().decode("utf-8", "replace"), noun)


def text_of(heads: Iterable[Head]) -> str:
    """Return a list as ThinkEdit's code has it."""
    return "[" + ", ".join(f"({layer}, {head})" for layer, head in heads) + "]"


def overlap(first: Iterable[Head], second: Iterable[Head]) -> float:
    """Return the share of the shorter list that stands in the other: agreement of two choices, order left out.

    ThinkEdit's own two releases agree on 9 of 10 to 38 of 40 heads, with replies generated anew.

    Raises:
        SteerError: a list is empty.
    """
    a, b = set(first), set(second)
    if not a or not b:
        raise SteerError("a list of heads is empty", "two lists with heads")
    return len(a & b) / min(len(a), len(b))
