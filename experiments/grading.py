r"""Grading mathematics: where the final answer of a reply stands, and whether it equals the right one.

The answer is the last `\boxed{…}` of the text, else whatever math-verify reads in the last formula, else the last
number. Equality is math-verify's (fractions, sets, tuples, thousands commas; 0.333 is not 1/3). math-verify guards its
parser with a signal, which works in the main thread only.
"""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType

from experiments.tasks.task import Graded
from steer.errors import SteerError

_NUMBER = re.compile(r"(?:(?<![\w)\]}.])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{2,}")
Place = tuple[int, int]


def boxed(text: str, start: int = 0) -> Place | None:
    r"""Characters [start, end) inside the last `\boxed{…}` that is closed, from `start` on."""
    for opening in reversed([found.end() for found in _BOX.finditer(text, start)]):
        depth = 1
        for place in range(opening, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if depth == 0:
                return opening, place
    return None


def last_number(text: str, start: int = 0) -> Place | None:
    """Characters of the last number: digits with thousands commas, a fraction after the point, a sign."""
    places = [found.span() for found in _NUMBER.finditer(text, start)]
    return places[-1] if places else None


def last_formula(text: str, start: int = 0) -> Place | None:
    r"""Characters inside the last `$…$`, `\(…\)` or `\[…\]`."""
    places = [found.span(found.lastindex or 0) for found in _FORMULA.finditer(text, start)]
    return places[-1] if places else None


def final_answer(text: str, start: int = 0, numeric: bool = False) -> Place | None:
    """Where the final answer stands.

    Args:
        text: the reply.
        start: the first character that counts.
        numeric: whether the right answer is a plain number; then formulas are not looked at.
    """
    place = boxed(text, start)
    if place is None and not numeric:
        place = last_formula(text, start)
    return last_number(text, start) if place is None else place


def grade_math(text: str, gold: str, start: int = 0) -> Graded:
    """Grade the final answer of `text`, from character `start` on.

    Raises:
        SteerError: math-verify is not installed.
    """
    place = final_answer(text, start, numeric=_NUMBER.fullmatch(gold.strip()) is not None)
    if place is None:
        return Graded()
    answer = text[slice(*place)]
    first = place[0] + len(answer) - len(answer.lstrip())
    stripped = answer.strip()
    return Graded(stripped, equal(gold, stripped), (first, first + len(stripped))) if stripped else Graded()


def equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same as mathematics; units in words after a number do not matter.

    Raises:
        SteerError: math-verify is not installed.
    """
    library = math_verify()
    right = library.parse(f"\\boxed{{{gold}}}")
    forms = dict.fromkeys((answer, without_words(answer)))
    return any(library.verify(right, library.parse(f"\\boxed{{{form}}}")) for form in forms)


def without_words(answer: str) -> str:
    r"""An answer without words: those of `\text{…}`, and without LaTeX all of two letters or more (units)."""
    if "\\" not in answer:
        return _WORD.sub(" ", answer).strip()
    return _TEXT.sub(lambda found: _WORD.sub(" ", found[1]), answer).strip()


def math_verify() -> ModuleType:
    """The library that compares answers.

    Raises:
        SteerError: it is not installed.
    """
    try:
        return import_module("math_verify")
    except ModuleNotFoundError as error:
        raise SteerError(
            "answers in mathematics are compared with math-verify, which is not installed",
            "the extra `eval`",
            "Install it: pip install 'reasoning-steer[eval]', or pip install math-verify",
        ) from error
