"""What the demos' reports share: the page around them, replies side by side, figures of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


Fits = Callable[[Trace, Trace], bool]
"""Whether a reply before and after a change is an example of a kind."""


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
    kinds: Sequence[tuple[str, Fits]],
    before: Run,
    after: Run,
    forms: Sequence[tuple[str, Run]],
    marks: Mapping[str, str],
) -> list[Example]:
    """Replies to the first questions, in the order of the run, of several kinds; kinds without a question are left out.

    The sampling of a question uses the same random numbers in every form of the model, so that what differs is the
    change.

    Args:
        kinds: what each is an example of, and which pairs of replies are.
        before, after: the runs whose replies are such pairs.
        forms: headings and runs that are shown.
        marks: `opening` and `closing`.
    """
    pairs = list(zip(before.traces, after.traces, strict=True))
    found = []
    for why, fits in kinds:
        place = next((index for index, pair in enumerate(pairs) if fits(*pair)), None)
        if place is not None:
            found.append(_example(why, place, forms, marks))
    return found


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
