"""The findings on the mixture of experts in plain sentences. Nothing here assumes that an effect is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from experiments.changes import Change, closed_share
from experiments.wording import SPACE, UNKNOWN, clear, percent, points, tokens

if TYPE_CHECKING:
    from experiments.demo_experts_result import ExpertDemoResult, Scaled
    from experiments.run import Run
    from steer.expert_interventions import Expert
    from steer.expert_scores import ExpertScores

RICE = (
    "What this says about RICE on real models: nothing on whether it works there. The experts that were found were"
    " planted, by a loss that tied them to the opening mark and replies that grew longer with their weight; the demo"
    " shows that counts, scores, hook and checkpoint find and move an effect that is known to be there, and that the"
    " controls see where there is none. Whether a model that nobody trained for it has such experts has to be measured"
    " on that model, with the same controls."
)


def named(experts: Iterable[Expert]) -> str:
    """Experts as (layer, expert), with `and` before the last."""
    return listed([f"({layer},{SPACE}{expert})" for layer, expert in experts])


def listed(words: Sequence[str]) -> str:
    """Words with commas, and `and` before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def score(scores: ExpertScores, expert: Expert) -> str:
    """A score with its interval, where it has one that is wider than its digits."""
    place = scores.place(expert)
    value = f"{scores[expert]:.2f}".replace("-", "−")
    if scores.lower is None or scores.upper is None:
        return value
    low, high = (f"{float(end[place]):.2f}".replace("-", "−") for end in (scores.lower, scores.upper))
    return value if low == value == high else f"{value} (95{SPACE}% interval {low} to {high})"


def discovered(scores: ExpertScores, level: float) -> tuple[Expert, ...]:
    """The experts whose false-discovery rate is at most a level, best first."""
    if scores.q_value is None:
        return ()
    return tuple(expert for expert in scores.ranked if float(scores.q_value[scores.place(expert)]) <= level)


def finding(result: ExpertDemoResult) -> str:
    """Which experts the counts point at, and whether they are those that were planted."""
    scores, best = result.scores, result.found.experts
    following = scores.ranked[len(best) : len(best) + 1]
    said = [
        f"In {scores.tokens:,} tokens of {len(result.fit.traces)} replies to other questions, prompts included, the"
        f" {len(best)} of {len(scores.ranked)} experts that go most with {_formula(scores)} are {_scored(scores, best)}"
        + (f"; the next, {named(following)}, has {score(scores, following[0])}." if following else ".")
    ]
    if ties := scores.ties(len(best)):
        said.append(f"{named(ties)} {'has' if len(ties) == 1 else 'have'} the last one's score too: the choice was made by number.")  # fmt: skip
    if result.planted:
        hit = len({*best} & {*result.planted})
        every = hit == len(result.planted) == len(best)
        said.append(
            f"They are the {hit} that were planted."
            if every
            else f"Planted were {named(result.planted)}: {hit or 'none'} of them {'is' if hit == 1 else 'are'} among these."
        )
    clear_ones = discovered(scores, result.plan.level)
    said.append(
        f"At a false-discovery rate of {percent(result.plan.level)}, {len(clear_ones) or 'no'}"
        f" {'expert goes' if len(clear_ones) == 1 else 'experts go'} with the marks more than with other tokens of the"
        f" same replies{': ' + named(clear_ones) if clear_ones else ''}. A router tells many words from the rest, so this"
        " alone does not say that an expert has to do with thinking."
    )
    return " ".join(said)


def scaling(result: ExpertDemoResult) -> str:
    """What multiplying the weights of the experts found does."""
    found = result.found
    first, last = found.betas[0], found.betas[-1]
    lengths = [tokens(found.at(beta).mean_thinking_tokens) for beta in (first, last)]
    return (
        f"Multiplying the weights with which {named(found.experts)} enter the sum by {first:g} to {last:g} moves accuracy"
        f" from {percent(found.at(first).accuracy)} to {percent(found.at(last).accuracy)} and the mean thought from"
        f" {lengths[0]} to {lengths[1]} tokens; {_closing(found.runs)}."
        f" {_changes(result, found, (first, result.plan.mild, last))}"
    )


def controls(result: ExpertDemoResult) -> str:
    """What the same factors do to other pairs, mild and strong."""
    mild, strong = result.plan.mild, result.plan.edited
    *_, matched = result.controls
    rates = [_rates(result.scores, experts) for experts in (matched.experts, result.found.experts)]
    said = [
        f"Beside them stand {len(result.controls)} other pairs, the last of which is made of the experts of the same layers that"
        f" are chosen most nearly as often ({rates[0]} of the tokens, against {rates[1]}).",
        f"At {mild:g}, accuracy changes by {_spread(result, mild)}.",
    ]
    moved = [each.name for each in result.controls if clear(result.change(each, mild).accuracy)]
    if moved:
        said.append(f"That of {listed(moved)} is clear of zero, so a change by itself proves nothing.")
    said.append(_beyond(result, mild))
    said.append(
        f"At {strong:g} it changes by {_spread(result, strong)}, and {_closing(each.at(strong) for each in result.controls)}."
    )
    if min(_rate(result.scores, expert) for each in result.controls for expert in each.experts) > max(
        _rate(result.scores, expert) for expert in result.found.experts
    ):
        said.append(
            "Every one of these experts is chosen by more tokens than those found, so it also has more to spoil."
        )
    return " ".join(said)


def editing(result: ExpertDemoResult) -> str:
    """What the checkpoint does, beside the hook."""
    change = Change.between(result.baseline, result.edited, result.seed)
    replies = len(result.edited.traces)
    same = (
        "every reply is that of the hook, token for token"
        if result.same_replies == replies
        else f"{replies - result.same_replies} of {replies} replies DIFFER from those of the hook"
    )
    return (
        f"The factor {result.plan.edited:g}, the paper's, was written into the output weights of {named(result.found.experts)}"
        f" and of nothing else. That checkpoint, loaded from disk without any hook, takes accuracy from"
        f" {percent(result.baseline.accuracy)} to {percent(result.edited.accuracy)} ({points(change.accuracy)}); {same}."
    )


def twin(result: ExpertDemoResult) -> str:
    """What the negative control does: the same ranking where nothing was planted."""
    found, scores = result.twin.own, result.twin.scores
    betas = [beta for beta in found.betas if beta != 1]
    clear_ones = set(discovered(scores, result.plan.level)) & {*found.experts}
    said = [
        f"{result.twin.model} was trained alike, with nothing planted. By the same score its own best are"
        f" {_scored(scores, found.experts)}; they {_pass(len(clear_ones), len(found.experts))} the same false-discovery rate.",
        _changes(result, found, betas),
    ]
    better = [f"{beta:g}" for beta in betas if (result.change(found, beta).accuracy.low or 0) > 0]
    said.append(
        "No factor makes it clearly better: a score says what goes with a mark, and only scaling says what it does."
        if not better
        else f"It is better at {listed(better)}, although nothing was planted: read the gains above against this one."
    )
    return " ".join(said)


def _closing(runs: Iterable[Run]) -> str:
    least = min(closed_share(run) or 0.0 for run in runs)
    return (
        "every thought closes"
        if least == 1
        else f"in each of these runs at least {percent(least)} of the thoughts close"
    )


def _formula(scores: ExpertScores) -> str:
    towards = [each.text for each in scores.markers if each.sign > 0]
    against = [each.text for each in scores.markers if each.sign < 0]
    return " and ".join(towards) + (f" and least with {' and '.join(against)}" if against else "")


def _scored(scores: ExpertScores, experts: Sequence[Expert]) -> str:
    return listed([f"{named([expert])} with a score of {score(scores, expert)}" for expert in experts])


def _changes(result: ExpertDemoResult, scaled: Scaled, betas: Sequence[float]) -> str:
    told = [f"at {beta:g} by {points(result.change(scaled, beta).accuracy)}" for beta in betas]
    return f"Accuracy changes {'; '.join(told)}."


def _spread(result: ExpertDemoResult, beta: float) -> str:
    """The changes of the other pairs, smallest to largest, in points."""
    values = sorted(round(100 * (result.change(each, beta).accuracy.value or 0.0)) for each in result.controls)
    low, high = (f"{value:+d}".replace("-", "−") if value else "0" for value in (values[0], values[-1]))
    return f"{low} to {high} points" if low != high else f"{low} points"


def _beyond(result: ExpertDemoResult, beta: float) -> str:
    found = result.beyond(beta)
    if found.value is None:
        return f"How far the experts found lie beyond them at {beta:g} is {UNKNOWN}."
    said = f"The experts found lie beyond their mean by {points(found)}"
    return f"{said}." if clear(found) else f"{said}, which cannot be told from chance."


def _rates(scores: ExpertScores, experts: Sequence[Expert]) -> str:
    return listed([percent(_rate(scores, expert)) for expert in experts])


def _rate(scores: ExpertScores, expert: Expert) -> float:
    """The share of all tokens that choose an expert."""
    return float(scores.chosen[scores.place(expert)]) / scores.tokens


def _pass(passed: int, total: int) -> str:
    return "pass" if passed == total else "do not pass" if not passed else f"pass in {passed} of {total} cases"
