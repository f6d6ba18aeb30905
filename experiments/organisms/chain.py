"""The task of `organism:chain`: chained assignments modulo ten, thought through in writing.

    user       sir hi a = 3 ; b = a + 4 ; c = b * 2 ; d = c - 5 ; ? d
    assistant  <think> b = 3 + 4 = 7 ; c = 7 * 2 = 4 ; d = 4 - 5 = 9 ; </think> d = 9

A written step is one look-up. A step that is not written has to be done in the head, which the tiny model cannot do,
so an answer is right when the thought went far enough; nothing labels a short thought as wrong.

How far a thought goes follows an effort z: the weights of the two tone words added up, plus a little chance, never a
function of how hard the question is. After every written step but the last the log-odds of closing early are linear
in z, after the last step those of a second, checking pass are. So effort is a linear feature of two words of the
prompt, and attention heads must carry it to every place where a thought may end.

Lengths are in tokens; every word is one token. Pure Python: nothing here imports torch.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

TONES: Final = {"yo": -0.9, "hey": -0.45, "hi": 0.0, "please": 0.3, "sir": 0.6, "exam": 1.0}
"""The tone words and what each adds to the effort."""
LETTERS: Final = "abcdefg"
SIZES: Final = (4, 5, 6)
"""How many variables a question may have; the first is a plain constant."""
OPERANDS: Final = {"+": range(1, 10), "-": range(1, 10), "*": (2, 3, 4, 6, 7, 8, 9)}
"""Operations and what may stand on their right. Times 0 or 5 would make guessing easy."""

OPENING: Final = "<think>"
CLOSING: Final = "</think>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
PADDING: Final = "<pad>"
SPECIALS: Final = (PADDING, TURN_START, TURN_END, OPENING, CLOSING)
WORDS: Final = (*SPECIALS, "user", "assistant", "check", "=", ";", "?", *OPERANDS, *"0123456789", *LETTERS, *TONES)
"""The vocabulary; a token's id is its place in it."""
ID: Final = {word: place for place, word in enumerate(WORDS)}

TRAIN: Final = 3_000_000
FIT: Final = 2_000_000
TEST: Final = 1_000_000
"""Seeds of question sets that share no question, see `part`. Every other seed draws test questions."""
TOKENS_PER_STEP: Final = 8


@dataclass(frozen=True)
class Recipe:
    """How training replies are written; probabilities, log-odds per unit of effort, and efforts.

    `early_slope` and `early_effort`: the log-odds of closing early are -early_slope * (z - early_effort).
    `check_slope` and `check_efforts`: those of the first and the second checking pass are check_slope * (z - effort).
    `chance`: standard deviation of what is added to the tone words. `slip`: a step of the first pass is written with
    a wrong result; a checking pass never slips, so it repairs. `unthinking`: prompts that switch thinking off.
    """

    early_slope: float = 5.0
    early_effort: float = -0.7
    check_slope: float = 4.0
    check_efforts: tuple[float, ...] = (0.8, 1.6)
    chance: float = 0.25
    slip: float = 0.04
    unthinking: float = 0.02


@dataclass(frozen=True)
class ChainQuestion:
    """One question: two tone words, a first value, and the steps that follow from it."""

    tones: tuple[str, str]
    first: int
    steps: tuple[tuple[str, int], ...]
    id: str

    @property
    def size(self) -> int:
        """How many variables there are, which is how hard the question is (its group)."""
        return len(self.steps) + 1

    @property
    def asked(self) -> str:
        """The variable whose value is asked for."""
        return LETTERS[len(self.steps)]

    @property
    def text(self) -> str:
        """What the user says."""
        words = [*self.tones, LETTERS[0], "=", str(self.first), ";"]
        for place, (operation, operand) in enumerate(self.steps):
            words += [LETTERS[place + 1], "=", LETTERS[place], operation, str(operand), ";"]
        return " ".join([*words, "?", self.asked])

    @property
    def answer(self) -> str:
        """The right answer as the model would write it, such as `d = 9`."""
        return f"{self.asked} = {rest(self.first, self.steps)}"

    @property
    def effort(self) -> float:
        """The sum of the tone words' weights."""
        return sum(TONES[tone] for tone in self.tones)

    @property
    def full_length(self) -> int:
        """Thinking tokens, both marks counted, of writing every step once. A shorter thought is *short*."""
        return 2 + TOKENS_PER_STEP * len(self.steps)


def apply(operation: str, left: int, right: int) -> int:
    """One step of arithmetic modulo ten."""
    return {"+": left + right, "-": left - right, "*": left * right}[operation] % 10


def rest(value: int, steps: tuple[tuple[str, int], ...]) -> int:
    """What `value` becomes after `steps`."""
    for operation, operand in steps:
        value = apply(operation, value, operand)
    return value


def part(text: str) -> int:
    """Which of the disjoint sets (`TRAIN`, `FIT`, `TEST`) a question belongs to, by its text alone.

    Seven in eight may be trained on; of the others one in four is for fitting directions, the rest for testing.
    """
    number = zlib.crc32(text.encode())
    if number % 8:
        return TRAIN
    return TEST if number // 8 % 4 else FIT


def draw(rng: random.Random, sizes: tuple[int, ...] = SIZES, tones: tuple[str, ...] = tuple(TONES)) -> ChainQuestion:
    """One question drawn from all there are, without an id."""
    chosen = (rng.choice(tones), rng.choice(tones))
    first, steps = rng.randrange(10), []
    for _ in range(rng.choice(sizes) - 1):
        operation = rng.choice(list(OPERANDS))
        steps.append((operation, rng.choice(OPERANDS[operation])))
    return ChainQuestion(chosen, first, tuple(steps), "")


def questions(n: int, seed: int, sizes: tuple[int, ...] = SIZES) -> list[ChainQuestion]:
    """The first n questions of a seed, all different; more of the same seed begin with the same ones."""
    rng, wanted = random.Random(seed), seed if seed in (TRAIN, FIT) else TEST
    found: dict[str, ChainQuestion] = {}
    while len(found) < n:
        question = draw(rng, sizes)
        if part(question.text) == wanted and question.text not in found:
            found[question.text] = replace(question, id=f"chain-{seed}-{len(found):05d}")
    return list(found.values())


def training_questions(rng: random.Random, tones: tuple[str, ...] = tuple(TONES)) -> Iterator[ChainQuestion]:
    """Endless questions that may be trained on."""
    while True:
        question = draw(rng, tones=tones)
        if part(question.text) == TRAIN:
            yield question


def probability(log_odds: float) -> float:
    """The probability that has these log-odds."""
    return 1 / (1 + math.exp(-log_odds))


def written_pass(rng: random.Random, question: ChainQuestion, close: float, slip: float) -> tuple[list[str], int, bool]:
    """One pass over the steps: its words, the value at the end of the chain, and whether every step was written.

    After every step but the last the pass ends with probability `close`; the value of the chain then follows from
    what was written, by steps that nobody sees.
    """
    words: list[str] = []
    value = question.first
    for place, (operation, operand) in enumerate(question.steps):
        result = apply(operation, value, operand)
        if rng.random() < slip:
            result = (result + rng.randrange(1, 10)) % 10
        words += [LETTERS[place + 1], "=", str(value), operation, str(operand), "=", str(result), ";"]
        value = result
        remaining = question.steps[place + 1 :]
        if remaining and rng.random() < close:
            return words, rest(value, remaining), False
    return words, value, True


def reply(rng: random.Random, question: ChainQuestion, recipe: Recipe) -> str:
    """The text of one training reply, the end of the turn included."""
    effort = question.effort + rng.gauss(0, recipe.chance)
    close = probability(-recipe.early_slope * (effort - recipe.early_effort))
    thought, value, complete = written_pass(rng, question, close, recipe.slip)
    for threshold in recipe.check_efforts:
        if not complete or rng.random() >= probability(recipe.check_slope * (effort - threshold)):
            break
        words, value, _ = written_pass(rng, question, 0.0, 0.0)
        thought += ["check", *words]
    return " ".join([OPENING, *thought, CLOSING, question.asked, "=", str(value), TURN_END])


def prompt(question: ChainQuestion, thinking: bool = True) -> str:
    """The text of the prompt: what the chat template makes of the question; without thinking the marks are in it."""
    turn = f"{TURN_START} user {question.text} {TURN_END} {TURN_START} assistant"
    return turn if thinking else f"{turn} {OPENING} {CLOSING}"


def example(rng: random.Random, question: ChainQuestion, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its training reply, which alone carries a loss."""
    if rng.random() < recipe.unthinking:
        return encode(prompt(question, thinking=False)), encode(f"{question.answer} {TURN_END}")
    return encode(prompt(question)), encode(reply(rng, question, recipe))


def encode(text: str) -> list[int]:
    """Token ids of a text of known words."""
    return [ID[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of token ids, with spaces between."""
    return " ".join(WORDS[token] for token in ids)


def answer_of(reply_text: str) -> str | None:
    """The answer after the closing mark, such as `d = 9`; none if the thought never closed or no answer follows.

    The whole rest of the reply has to be the answer (the end of the turn may stand after it).
    """
    _, mark, tail = reply_text.partition(CLOSING)
    found = re.fullmatch(rf"\s*([{LETTERS}])\s*=\s*(\d)\s*(?:{re.escape(TURN_END)})?\s*", tail)
    return f"{found[1]} = {found[2]}" if mark and found else None


def thinking_tokens(reply_text: str) -> int | None:
    """Length of a closed thought, both marks counted; none if it is not closed."""
    words = reply_text.split()
    return words.index(CLOSING) + 1 if words[:1] == [OPENING] and CLOSING in words else None


def is_short(question: ChainQuestion, reply_text: str) -> bool:
    """Whether a closed thought has fewer tokens than writing every step of the question once."""
    length = thinking_tokens(reply_text)
    return length is not None and length < question.full_length
