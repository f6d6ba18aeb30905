"""What a sweep over numbers of experts and betas found: the points tried, the one chosen, and what it does elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.compared import AIMS
from steer.expert_interventions import Expert, ScaleExperts
from steer.identity import ModelIdentity
from steer.intervals import Interval
from steer.steering import Steering
from steer.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FIGURES = ("accuracy", "length", "closed", "thoughts", "repetition")
"""Share of right replies; tokens of thought; share of thoughts that end; thoughts and share of repeated n-grams, both of
`probes.text`."""
UNSTEERED, CHOSEN = "unsteered", "chosen"


@dataclass(frozen=True)
class Answered:
    """What one model did on some questions.

    Attributes:
        name: "unsteered", "tried", "chosen", "random 1", "matched 1", "prompt" or "decoding".
        told: the text of a prompt, the name of a policy, or the experts and beta in words.
        experts: that were scaled; none for an unsteered model.
        beta: by which; 1 for an unsteered model.
        means: each of `FIGURES` with its interval over questions; without a value where no reply has one.
        changes: the same less that of the unsteered model, on the same drawn questions and with the same random numbers.
        by_seed: accuracy of each sampling seed alone.
    """

    name: str
    told: str
    experts: tuple[Expert, ...]
    beta: float
    means: Mapping[str, Interval]
    changes: Mapping[str, Interval]
    by_seed: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """Return everything as one row of a table."""
        found: dict[str, Any] = {"model": self.name, "what": self.told, "number": len(self.experts), "beta": self.beta}
        for name in FIGURES:
            each = self.means[name]
            found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
        for name in FIGURES:
            each = self.changes[name]
            found |= {f"{name}_change": each.value, f"{name}_change_low": each.low, f"{name}_change_high": each.high}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        means, changes = ({name: each.to_dict() for name, each in which.items()} for which in (self.means, self.changes))  # fmt: skip
        return {
            "model": self.name,
            "what": self.told,
            "experts": [list(expert) for expert in self.experts],
            "beta": self.beta,
            **means,
            "changes": changes,
            "accuracy_by_seed": [round(value, 6) for value in self.by_seed],
        }


@dataclass(frozen=True)
class ExpertSweep:
    """A sweep.

    Attributes:
        tried: on the choosing questions, the unsteered model first, then by number of experts and beta.
        chosen: place in `tried`; 0 where no point was better than the unsteered model under the rule.
        floor, aim: of the rule (`probes.compared.first`).
        band: random experts, as many as chosen, at every beta, on the choosing questions.
        baselines: prompts and policies on the choosing questions, where one of each kind was chosen in the same way.
        report: on the reporting questions alone: unsteered, chosen, controls, baselines.
        beyond: of each of `FIGURES`, chosen less the mean of random and matched experts; None without controls.
        against: name of a baseline -> the same, chosen less that baseline.
        questions: how many to fit, to choose and to report on.
        seeds: replies per reporting question.
        remarks: what was left out and why, and what is not known.
        phase, renormalise: of the scaling.
        model: the model.
    """

    tried: tuple[Answered, ...]
    chosen: int
    floor: float
    aim: str
    band: tuple[Answered, ...]
    baselines: tuple[Answered, ...]
    report: tuple[Answered, ...]
    beyond: Mapping[str, Interval] | None
    against: Mapping[str, Mapping[str, Interval]]
    questions: tuple[int, int, int]
    seeds: int
    remarks: tuple[str, ...]
    phase: str
    renormalise: bool
    model: ModelIdentity | None

    @property
    def best(self) -> Answered:
        """What was chosen, as it did on the choosing questions."""
        return self.tried[self.chosen]

    @property
    def steering(self) -> Steering | None:
        """The chosen scaling; None where the unsteered model was chosen."""
        if not self.chosen:
            return None
        scaled = ScaleExperts(self.best.experts, self.best.beta, self.renormalise, self.phase)
        return Steering((scaled,), self.model, "experts")

    def sentences(self) -> tuple[str, ...]:
        """Say what was chosen, what it does on other questions, and whether experts like them do as much."""
        allowed = sum((each.means["accuracy"].value or 0.0) >= self.floor - 1e-9 for each in self.tried)
        choice = (
            f"Chosen on {self.questions[1]} questions: {self.best.told} ({AIMS[self.aim]}, among {allowed} of "
            f"{len(self.tried)} points with an accuracy of {self.floor:.3f} or more)."
        )
        if not self.chosen:
            return choice, "No number of experts and no beta came before the unsteered model, so none is to be used.", *self.remarks  # fmt: skip
        told = self.report[1]
        effect = (
            f"On {self.questions[2]} other questions, {self.seeds} seeds each: accuracy {_told(told.means['accuracy'])} "
            f"({_told(told.changes['accuracy'], sign=True)}), length {_told(told.means['length'], 1)} "
            f"({_told(told.changes['length'], 1, sign=True)})."
        )
        return choice, effect, self.verdict, *self._harm(), *self._against(), *self.remarks

    @property
    def verdict(self) -> str:
        """Whether the chosen experts do more than others: of random and matched experts, at the same beta."""
        if not self.chosen:
            return "There is nothing to compare."
        if self.beyond is None:
            return "No experts were scaled beside them, so nobody can say whether any others would do."
        names = [each.name.split()[0] for each in self.report]
        others = " and ".join(f"{names.count(kind)} {kind}" for kind in ("random", "matched") if kind in names)
        return self._compared(
            self.beyond, f"other experts at the same beta ({others} sets of {len(self.best.experts)})"
        )

    def _harm(self) -> list[str]:
        """Say where the controls do harm by themselves, which makes the chosen experts look better beside them."""
        changes = [each.changes["accuracy"] for each in self.report if each.name.startswith(("random", "matched"))]
        if not changes or not all(each.high is not None and each.high < 0 for each in changes):
            return []
        mean = sum(each.value or 0.0 for each in changes) / len(changes)
        return [
            f"At this beta every one of these other sets loses accuracy ({mean:+.3f} on average), so much of that difference is "
            "their harm: read the change against the unsteered model, and the other sets at smaller betas."
        ]

    def _against(self) -> list[str]:
        told = {each.name: f"the {'prompt' if each.name == 'prompt' else 'policy'} {each.told}" for each in self.report}
        return [self._compared(each, told[name]) for name, each in self.against.items()]

    def _compared(self, found: Mapping[str, Interval], others: str) -> str:
        """Say by what the aim is told whether the chosen experts do more; nothing where the interval holds 0."""
        name, better = ("accuracy", 1) if self.aim == "accuracy" else ("length", -1 if self.aim == "shorter" else 1)
        each = found[name]
        less = each.low is None or each.high is None or each.low <= 0 <= each.high
        word = "do nothing beyond" if less else f"do {'more' if (each.value or 0.0) * better > 0 else 'worse'} than"
        return f"In {name} they {word} {others}: {_told(each, 3 if name == 'accuracy' else 1, sign=True)}."

    def frame(self) -> DataFrame:
        """Return one row per model and part ("choice" or "report"), with whether it was chosen.

        Raises:
            SteerError: pandas is not installed.
        """
        rows = [{"part": part, **each.row(), "chosen": each is self.best} for part, each in self._rows()]
        return table(rows, list(rows[0]))

    def _rows(self) -> list[tuple[str, Answered]]:
        return [("choice", each) for each in (*self.tried, *self.band, *self.baselines)] + [
            ("report", each) for each in self.report
        ]

    def _repr_html_(self) -> str:
        told = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences())
        return f"{told}{_html(self.report)}<details><summary>Tried</summary>{_html(self.tried)}</details>"

    def plot(self) -> Figure:
        """Draw accuracy, length and repetition on the choosing questions against beta, one line per number of experts."""
        from experiments.expert_sweep_figure import figure_of

        return figure_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with everything that is shown."""
        return {
            "chosen": None if not self.chosen else {"experts": [list(expert) for expert in self.best.experts], "beta": self.best.beta},
            "rule": {"aim": self.aim, "floor": self.floor},
            "questions": dict(zip(("fit", "choose", "report"), self.questions, strict=True)),
            "seeds": self.seeds,
            "phase": self.phase,
            "renormalise": self.renormalise,
            "tried": [each.to_dict() for each in self.tried],
            "band": [each.to_dict() for each in self.band],
            "baselines": [each.to_dict() for each in self.baselines],
            "report": [each.to_dict() for each in self.report],
            "beyond": None if self.beyond is None else _plain(self.beyond),
            "against": {name: _plain(each) for name, each in self.against.items()},
            "sentences": list(self.sentences()),
        }  # fmt: skip


def _plain(found: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: each.to_dict() for name, each in found.items()}


def _told(found: Interval, digits: int = 3, sign: bool = False) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "–"
    plus = "+" if sign else ""
    return f"{found.value:{plus}.{digits}f} [{found.low:{plus}.{digits}f}, {found.high:{plus}.{digits}f}]"


def cells(rows: Sequence[Answered]) -> tuple[list[str], list[list[object]]]:
    """Return the head and the cells of a table for people."""
    digits = {"length": 1, "thoughts": 2}
    head = ["model", "what", *FIGURES, "accuracy change", "length change"]
    return head, [
        [each.name, each.told, *(_told(each.means[name], digits.get(name, 3)) for name in FIGURES), _told(each.changes["accuracy"], 3, True), _told(each.changes["length"], 1, True)]
        for each in rows
    ]  # fmt: skip


def _html(rows: Sequence[Answered]) -> str:
    head, body = cells(rows)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{lines}</table>"
