"""What `edits.verify` measured: how two subjects agree, overall, per phase, and in what they write."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.logits import agreement
from steer.phases import State
from steer.tables import table

if TYPE_CHECKING:
    import pandas

PHASES = {State.PROMPT: "prompt", State.OPENING: "opening", State.THINKING: "thinking", State.ANSWER: "answer"}


@dataclass(frozen=True)
class PhaseAgreement:
    """How the logits agree in one phase.

    Attributes:
        phase: `prompt`, `opening`, `thinking`, `answer`; `generated` for a model without marks.
        positions: how many were compared.
        kl: mean KL(first || second) in nats per position.
        top1_agreement: share of positions where both put the same token first.
        max_abs_logit_difference: over these positions.
    """

    phase: str
    positions: int
    kl: float
    top1_agreement: float
    max_abs_logit_difference: float


@dataclass(frozen=True)
class Greedy:
    """How far two subjects write the same when each takes its most likely token.

    Attributes:
        replies: how many were begun, and how many `same` to their last token.
        tokens: how many the first subject wrote, and how many `agreed` before the first that differs.
        first_difference: where the earliest differing token stands in its reply, from 0; None where none differs.
    """

    replies: int
    same: int
    tokens: int
    agreed: int
    first_difference: int | None


@dataclass(frozen=True)
class Agreement:
    """How two subjects agree.

    Attributes:
        first, second: their names.
        passed: no tensor differs, and the logits differ by at most `tolerance` where they were compared.
        bytes_equal: whether every tensor on disk is equal after the patches; None where a side has no tensors on disk
            or a change without a patch form.
        tensors: how many tensors were compared.
        patched: how many of them a patch touches.
        differing: names of tensors that differ.
        max_abs_logit_difference: over all prompts and positions; None where no model was run.
        kl: mean KL(first || second) in nats per position.
        top1_agreement: share of positions where both put the same token first.
        positions: how many were compared.
        floor: max |logits in fp32 - in fp64| of the second subject; None for a model too large for a copy.
        cast: max |effect on the logits| of rounding the change to the checkpoint's dtype, where a hook is compared.
        tolerance: what the logit difference was held against.
        phases: the same measures per phase, of those that occur.
        greedy: how far greedy replies agree; None where none was written.
    """

    first: str
    second: str
    passed: bool
    bytes_equal: bool | None = None
    tensors: int = 0
    patched: int = 0
    differing: tuple[str, ...] = ()
    max_abs_logit_difference: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    positions: int = 0
    floor: float | None = None
    cast: float | None = None
    tolerance: float | None = None
    phases: tuple[PhaseAgreement, ...] = ()
    greedy: Greedy | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self) | {"differing": list(self.differing), "phases": [asdict(each) for each in self.phases]}

    def rows(self) -> list[tuple[str, str]]:
        """What was measured, as label and text."""
        rows = [("first", self.first), ("second", self.second)]
        words = {None: "not comparable", True: "equal", False: "differ: " + ", ".join(self.differing[:3])}
        more = f" and {len(self.differing) - 3} more" if len(self.differing) > 3 else ""
        rows.append(("bytes", f"{words[self.bytes_equal]}{more} ({self.tensors} tensors, {self.patched} patched)"))
        if self.max_abs_logit_difference is not None:
            rows += [
                ("max |logit difference|", f"{self.max_abs_logit_difference:.3g}"),
                ("tolerance", f"{self.tolerance:.3g}"),
                ("floor (fp32 against fp64)", "too large a model" if self.floor is None else f"{self.floor:.3g}"),
                ("KL", f"{self.kl:.3g} nats"),
                ("same top token", f"{self.top1_agreement:.1%} of {self.positions} positions"),
            ]
        rows += [
            (f"in {each.phase}", f"KL {each.kl:.3g} nats, {each.top1_agreement:.1%} of {each.positions} positions")
            for each in self.phases
        ]
        if self.greedy is not None:
            rows.append(("greedy replies", _greedy_text(self.greedy)))
        if self.cast is not None:
            rows.append(("effect of the cast", f"{self.cast:.3g}"))
        return [*rows, ("verdict", "agree" if self.passed else "DISAGREE")]

    def frame(self) -> pandas.DataFrame:
        """Return one row per measure: first, second, measure, value; `differing` is a count, None was not measured.

        Measures of a phase are called `kl_thinking` and so on, those of greedy replies `greedy_same` and so on.

        Raises:
            SteerError: pandas is not installed.
        """
        names = ("first", "second")
        rows = [
            {"first": self.first, "second": self.second, "measure": name, "value": value}
            for name, value in self._measures()
        ]
        return table(rows, [*names, "measure", "value"])

    def _measures(self) -> Iterator[tuple[str, Any]]:
        values = self.to_dict() | {"differing": len(self.differing)}
        for name, value in values.items():
            if name not in ("first", "second", "phases", "greedy"):
                yield name, value
        for phase in values["phases"]:
            yield from ((f"{name}_{phase['phase']}", value) for name, value in phase.items() if name != "phase")
        yield from ((f"greedy_{name}", value) for name, value in (values["greedy"] or {}).items())

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label.ljust(width)}  {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>" for label, text in self.rows())
        return f"<table>{''.join(cells)}</table>"


def _greedy_text(greedy: Greedy) -> str:
    text = f"{greedy.same} of {greedy.replies} the same, {greedy.agreed} of {greedy.tokens} tokens before a difference"
    where = "" if greedy.first_difference is None else f"; the earliest at token {greedy.first_difference}"
    return text + where


def by_phase(
    first: Float[Tensor, "position vocab"],
    second: Float[Tensor, "position vocab"],
    states: Sequence[State],
    marked: bool,
) -> tuple[PhaseAgreement, ...]:
    """Measure the agreement of each phase that occurs.

    Args:
        first, second: logits at the same positions.
        states: of each position, after its token was read.
        marked: whether the model has marks; without them everything generated is one phase.
    """
    found = []
    for state, name in PHASES.items():
        places = torch.tensor([each == state for each in states])
        if places.any():
            measured = agreement(first[places], second[places])
            label = name if marked or state == State.PROMPT else "generated"
            figures = (measured.mean_kl, measured.top_1, measured.max_difference)
            found.append(PhaseAgreement(label, measured.places, *figures))
    return tuple(found)


def greedy_agreement(
    first: Sequence[Float[Tensor, "_ vocab"]],
    second: Sequence[Float[Tensor, "_ vocab"]],
    replies: Sequence[tuple[int, int]],
) -> Greedy | None:
    """Say how far greedy replies agree, from logits along the replies of the first subject.

    Up to the first place where the second would have taken another token both have read the same, so this is where
    its own greedy reply leaves that of the first.

    Args:
        first, second: logits per sequence.
        replies: per sequence the index of the first token of the reply, and its length; a length of 0 is left out.
    """
    agreed, same, lengths, earliest = 0, 0, 0, []
    for a, b, (start, length) in zip(first, second, replies, strict=True):
        if length:
            places = slice(start - 1, start - 1 + length)
            differs = (a[places].argmax(-1) != b[places].argmax(-1)).nonzero()
            until = int(differs[0]) if len(differs) else length
            earliest += [until] if len(differs) else []
            agreed, same, lengths = agreed + until, same + (until == length), lengths + length
    count = sum(length > 0 for _, length in replies)
    return Greedy(count, same, lengths, agreed, min(earliest, default=None)) if count else None
