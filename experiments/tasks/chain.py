"""The task of `organism:chain`; `chain` or `chain:test` are its test questions, `chain:fit` those for directions.

The questions and the reading of an answer belong to the organism, `experiments.organisms.chain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.organisms import chain
from experiments.tasks.task import Graded, Item
from steer.errors import SteerError

SPLITS = {"test": chain.TEST, "fit": chain.FIT}
DEFAULT = 200


@dataclass(frozen=True)
class Chain:
    """Questions of one split; they are endless, so without a limit there are 200.

    Attributes:
        split: test or fit, which share no question.
    """

    split: str = "test"

    @property
    def name(self) -> str:
        """Name, as in run.yaml."""
        return "chain"

    def options(self) -> dict[str, Any]:
        """The split and the seed of its questions."""
        return {"split": self.split, "questions_seed": SPLITS[self.split]}

    def items(self, limit: int | None = None) -> list[Item]:
        """The first questions of the split; the group is the number of variables."""
        found = chain.questions(DEFAULT if limit is None else limit, SPLITS[self.split])
        return [
            Item(question.id, question.text, question.answer, str(question.size), question.full_length)
            for question in found
        ]

    def grade(self, text: str, gold: str, start: int | None) -> Graded:
        """The whole rest of the reply after the thought has to be the answer, such as `d = 9`."""
        if start is None:
            return Graded()
        answer = chain.answer_of(f"{chain.CLOSING} {text[start:]}")
        if answer is None:
            return Graded()
        first = start + len(text[start:]) - len(text[start:].lstrip())
        return Graded(answer, answer == gold, (first, first + len(text[first:].removesuffix(chain.TURN_END).rstrip())))


def make(argument: str | None, instruction: str | None) -> Chain:
    """Make the task of `chain[:SPLIT]`.

    Raises:
        SteerError: there is no such split, or an instruction was given.
    """
    if argument is not None and argument not in SPLITS:
        raise SteerError(f"the task chain has no split {argument!r}", f"one of {', '.join(SPLITS)}")
    if instruction:
        raise SteerError(
            "an instruction was given for the task chain", "none", "The organism knows 37 words; leave it out"
        )
    return Chain(argument or "test")
