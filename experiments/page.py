"""What the demos' reports share: the page around them, replies side by side, figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments import wording
from experiments.run import Run
from steer.intervals import Interval
from steer.trace import Trace


@dataclass(frozen=True)
class Example:
    """One question with the replies of several forms of the model side by side.

    Attributes:
        why: what it is an example of.
        question: as the user said it.
        gold: the right answer.
        replies: heading, HTML of the reply, tokens of thought, whether it is right.
    """

    why: str
    question: str
    gold: str
    replies: tuple[tuple[str, Markup, str, bool], ...]


def filled(template: str, **given: Any) -> str:
    """The HTML of a template of `experiments/templates`; a name that is missing there is an error."""
    environment = Environment(
        loader=PackageLoader("experiments", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": wording.percent, "tokens": wording.tokens}
    return environment.get_template(template).render(given)


def interval(run: Run, *path: str) -> Interval:
    """An interval of a run's summary."""
    found = entry(run, *path)
    return Interval(found["value"], found.get("low"), found.get("high"))


def entry(run: Run, *path: str) -> dict[str, Any]:
    """A part of a run's summary."""
    found: dict[str, Any] = run.summary
    for key in path:
        found = found[key]
    return found


def chosen_examples(
    repaired: str,
    same: str,
    harmed: str,
    before: Run,
    after: Run,
    forms: Sequence[tuple[str, Run]],
    marks: Mapping[str, str],
) -> list[Example]:
    """Replies to the first question, in the order of the run, of each of three kinds; kinds without a question are left out.

    The sampling of a question uses the same random numbers in every form of the model, so that what differs is the
    change.

    Args:
        repaired: what is said of a short wrong thought that became right.
        same: of a full right one that stayed right.
        harmed: of a right one that became wrong.
        before, after: the runs whose replies are such pairs.
        forms: headings and runs that are shown.
        marks: `opening` and `closing`.
    """
    kinds = [_kind(before, *pair) for pair in zip(before.traces, after.traces, strict=True)]
    said = {"repaired": repaired, "same": same, "harmed": harmed}
    return [_example(why, kinds.index(kind), forms, marks) for kind, why in said.items() if kind in kinds]


def _kind(run: Run, before: Trace, after: Trace) -> str | None:
    """What a pair of replies is an example of, if of anything."""
    if before.correct and not after.correct:
        return "harmed"
    if after.correct and is_short(run, before) != bool(before.correct):
        return "same" if before.correct else "repaired"
    return None


def is_short(run: Run, trace: Trace) -> bool:
    """Whether a finished thought of the run is shorter than its question asks for."""
    below = run.short_below.get(trace.item)
    return below is not None and bool(trace.closed) and (trace.thinking_tokens or 0) < below


def _example(why: str, place: int, forms: Sequence[tuple[str, Run]], marks: Mapping[str, str]) -> Example:
    trace = forms[0][1].traces[place]
    replies = []
    for heading, run in forms:
        reply = run.traces[place]
        length = f"{reply.thinking_tokens} tokens of thought" if reply.closed else "the thought was not closed"
        replies.append((heading, marked(reply.text, marks["opening"], marks["closing"]), length, bool(reply.correct)))
    question = trace.prompt if isinstance(trace.prompt, str) else str(trace.prompt[-1]["content"])
    return Example(why, question, trace.gold or "", tuple(replies))


def marked(text: str, opening: str, closing: str) -> Markup:
    """A reply as HTML, its thinking set off by colour and by its own marks in bold."""
    before, found, rest = text.partition(opening)
    if not found:
        return Markup(escape(text))
    thought, closed, answer = rest.partition(closing)
    end = f"<b>{escape(closing)}</b>" if closed else ""
    inner = f"<b>{escape(opening)}</b>{escape(thought)}{end}"
    return Markup(f'{escape(before)}<span class="thought">{inner}</span>{escape(answer)}')
