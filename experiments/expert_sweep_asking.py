"""Whom a sweep over experts asks: scaled models, their controls, and what is cheaper than scaling experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from experiments.again import Again
from experiments.expert_sweep_result import CHOSEN, UNSTEERED, Answered
from experiments.think_policies import MinimumThinking, SwitchPenalty, ThinkingBudget
from experiments.think_policies.switching import WORDS, spellings
from probes.compared import DROP, Answers, answers, first, plain_columns
from probes.text import MARKERS, text_signals
from steer.expert_interventions import Expert, ScaleExperts
from steer.expert_scores import ExpertScores
from steer.policy import Policy
from steer.sampling import BrokenLogitsError
from steer.steering import Steering
from steer.trace import Trace
from steer.traces import Traces

if TYPE_CHECKING:
    from steer.model import SteerableModel

Tell = Callable[[int], None]
QUANTILES = {"shorter": (0.25, 0.5), "longer": (0.5, 0.9), "accuracy": (0.5, 0.9)}
"""Of the lengths of unsteered thoughts: the limits that `usual_policies` tries."""


@dataclass(frozen=True)
class Asked:
    """A model that is asked.

    Attributes:
        name, told: see `Answered`.
        experts, beta: scaled, if any.
        before, policy: instead of them.
    """

    name: str
    told: str
    experts: tuple[Expert, ...] = ()
    beta: float = 1.0
    before: str | None = None
    policy: Policy | None = None


PLAIN = Asked(UNSTEERED, UNSTEERED)


def scaled(name: str, experts: Sequence[Expert], beta: float) -> Asked:
    """Return a model with some experts scaled."""
    ordered = tuple(sorted(experts))
    listed = ", ".join(f"({layer}, {expert})" for layer, expert in ordered)
    told = f"{len(ordered)} expert{'s' * (len(ordered) != 1)} × {beta:g}: {listed}"
    return Asked(name, told, ordered, beta)


@dataclass(frozen=True)
class Job:
    """How everybody is asked and measured.

    Attributes:
        model: unsteered.
        again: asks.
        switches: words that begin another thought.
        phase, renormalise: of the scaling.
        options: of the intervals.
        tell: told after every model how many replies there were.
        broken: what could not be asked; it grows.
    """

    model: SteerableModel
    again: Again
    switches: tuple[str, ...]
    phase: str
    renormalise: bool
    options: Mapping[str, int]
    tell: Tell | None
    broken: list[str] = field(default_factory=list)

    def ask(self, asked: Asked, items: Iterable[str], samples: int | None) -> list[Trace]:
        """Return graded replies."""
        view = self.model
        if asked.experts:
            scaling = ScaleExperts(asked.experts, asked.beta, self.renormalise, self.phase)
            view = view.with_(Steering((scaling,), self.model.identity))
        found = self.again.ask(view, items, samples=samples, policy=asked.policy, before=asked.before)
        if self.tell is not None:
            self.tell(len(found))
        return found

    def measured(
        self, rows: Sequence[Asked], items: Iterable[str], plain: Sequence[Trace] | None, samples: int | None = None
    ) -> tuple[list[Answered], list[Answers]]:
        """Ask every model and compare it with the unsteered one, which stands first.

        A scaling under which the logits are no numbers is left out and noted in `broken`; the chosen one is an error.

        Args:
            rows: whom.
            items: which questions.
            plain: replies of the unsteered model that are there; None: it is asked.
            samples: replies to each question; None: as many as the run has.
        """
        items, asked, runs = sorted(items), list[Asked](), list[list[Trace]]()
        for place, row in enumerate(rows):
            try:
                runs.append(self.ask(row, items, samples) if place or plain is None else list(plain))
            except BrokenLogitsError:
                if not row.experts or row.name == CHOSEN:
                    raise
                self.broken.append(f"{row.told} breaks the model: its logits are no numbers.")
                continue
            asked.append(row)
        tables = answers(dict(enumerate(runs)), self._columns)
        found = [self._answered(row, tables[place], tables[0]) for place, row in enumerate(asked)]
        return found, [tables[place] for place in range(len(asked))]

    def _answered(self, row: Asked, table: Answers, plain: Answers) -> Answered:
        means, changes = table.means(**self.options), table.changes(plain, **self.options)
        right = np.array(table.columns["accuracy"], dtype=np.float64)
        seeds = tuple(float(value) for value in right.mean(0))
        return Answered(row.name, row.told, row.experts, row.beta, means, changes, seeds)

    def _columns(self, traces: Sequence[Trace]) -> dict[str, list[float | None]]:
        marks = self.model.marks
        signals = text_signals(
            Traces(traces, {"marks": marks.to_dict()}),
            self.model.tokenizer,
            span="thinking" if marks.exist else "before_answer",
            markers=[word for word in MARKERS if word not in {switch.lower() for switch in self.switches}],
            switches=self.switches,
        )
        return {
            **plain_columns(traces),
            "thoughts": [float(row.thoughts) if row.tokens else None for row in signals],
            "repetition": [row.repetition for row in signals],
        }


def usual_policies(model: SteerableModel, plain: Sequence[Trace], aim: str) -> tuple[Policy, ...]:
    """Return the decoding constraints for an aim: cheaper ways to the same end.

    Shorter thoughts: budgets. Otherwise the penalty on switching thoughts, where the tokenizer writes its word as one token,
    else a minimum of thinking. Limits are quantiles of the lengths of the unsteered thoughts. None where nothing fits.
    """
    if aim != "shorter" and spellings(WORDS[0], model.tokenizer):
        return (SwitchPenalty.of(model.marks, model.tokenizer),)
    lengths = [trace.thinking_tokens for trace in plain if trace.thinking_tokens is not None]
    if not model.marks.exist or not lengths:
        return ()
    limits = sorted({max(int(np.quantile(lengths, at)), 1) for at in QUANTILES[aim]})
    if aim == "shorter":
        return tuple(ThinkingBudget.of(limit, model.marks) for limit in limits)
    end = model.tokenizer.eos_token_id
    return tuple(MinimumThinking.of(limit, model.marks, () if end is None else (int(end),)) for limit in limits)


def baselines(
    job: Job, plain: Sequence[Trace], prompts: Sequence[str], policies: Sequence[Policy] | None, aim: str
) -> tuple[list[Asked], list[str]]:
    """Return the prompts and policies to ask, and what is left out and why."""
    found, missing = [Asked("prompt", repr(text), before=text) for text in prompts], []
    if not prompts:
        missing.append("No prompt stands beside the experts: none was given (prompts=, --prompt).")
    if job.again.policy is not None:
        missing.append(f"No decoding constraint stands beside the experts: the run has the policy {job.again.policy.name} already.")  # fmt: skip
        return found, missing
    chosen = usual_policies(job.model, plain, aim) if policies is None else tuple(policies)
    if not chosen:
        missing.append("No decoding constraint stands beside the experts: none was given (policies=, --policy).")
    return found + [Asked("decoding", policy.name, policy=policy) for policy in chosen], missing


def best_of_each(rows: Sequence[Asked], measured: Sequence[Answered], aim: str) -> list[Asked]:
    """Return the best prompt and the best policy by the aim; of equal ones the earlier."""
    best = []
    for kind in ("prompt", "decoding"):
        places = [place for place, row in enumerate(rows) if row.name == kind]
        if places:
            place, _ = place_of_first([measured[place] for place in places], aim, 0.0)
            best.append(rows[places[place]])
    return best


def place_of_first(measured: Sequence[Answered], aim: str, floor: float | None) -> tuple[int, float]:
    """Return the place of the first by the rule, and the floor; of equal ones the weakest, then the fewest experts."""
    means = [(each.means["accuracy"].value or 0.0, each.means["length"].value or 0.0) for each in measured]
    costs = [(_strength(each.beta), float(len(each.experts))) for each in measured]
    return first(means, costs, [each.told for each in measured], floor=floor, drop=DROP, aim=aim)


def _strength(beta: float) -> float:
    """How far a factor is from 1: twice as much is as far as half as much."""
    return float("inf") if beta == 0 else abs(float(np.log2(beta)))


def matched_draws(scores: ExpertScores, experts: Sequence[Expert], draws: int, seed: int) -> tuple[list[tuple[Expert, ...]], list[str]]:  # fmt: skip
    """Return sets of frequency-matched experts that share none, as many as the layers have others, and what is missing."""
    others = {
        layer: sum(other[0] == layer for other in scores.ranked) - sum(one[0] == layer for one in experts)
        for layer, _ in experts
    }
    possible = min(count // sum(one[0] == layer for one in experts) for layer, count in others.items())
    taken: list[tuple[Expert, ...]] = []
    for number in range(1, min(draws, possible) + 1):
        taken.append(scores.matched(experts, seed + number, {one for draw in taken for one in draw}))
    short = draws > possible
    return taken, [f"{possible} frequency-matched sets instead of {draws}: the layers have no more others."] * short
