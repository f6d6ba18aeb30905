"""The demo's findings in plain sentences. What cannot be told from chance is said to be so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.intervals import Interval

if TYPE_CHECKING:
    from edits.agreement import Agreement
    from experiments.demo_result import DemoResult
    from experiments.run import Run

UNKNOWN = "not known"
SPACE = "\u00a0"  # Keeps a number and its unit on one line.


def percent(value: float | None) -> str:
    """A share in per cent, with a decimal where it is no whole number."""
    return UNKNOWN if value is None else f"{100 * value:.1f}".removesuffix(".0") + f"{SPACE}%"


def tokens(value: float | None) -> str:
    """A mean length: one decimal below ten, whole tokens above."""
    if value is None:
        return UNKNOWN
    return f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"


def points(change: Interval) -> str:
    """A change of a share in points, with its interval."""
    if change.value is None or change.low is None or change.high is None:
        return UNKNOWN
    low, value, high = (100 * each for each in (change.low, change.value, change.high))
    return f"{value:+.0f}{SPACE}points, 95{SPACE}% interval {low:+.0f} to {high:+.0f}".replace("-", "−")


def brief(change: Interval) -> str:
    """A change of a share in points, for a table: value (low to high)."""
    if change.value is None or change.low is None or change.high is None:
        return UNKNOWN
    low, value, high = (
        f"{round(100 * each):+d}" if round(100 * each) else "0" for each in (change.low, change.value, change.high)
    )
    return f"{value} ({low} to {high})".replace("-", "−").replace(" ", SPACE)


def small(value: float | None) -> str:
    """A very small number as m × 10ⁿ."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "nothing"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}{SPACE}×{SPACE}10{power}"


def fine_points(change: Interval, decimals: int = 1) -> str:
    """A change of a share in points with decimals, with its interval; a zero has no sign."""
    if change.value is None or change.low is None or change.high is None:
        return UNKNOWN
    low, value, high = (
        f"{shown:+g}" if (shown := round(100 * each, decimals)) else "0"
        for each in (change.low, change.value, change.high)
    )
    return f"{value}{SPACE}points ({low} to {high})".replace("-", "−")


def clear(change: Interval) -> bool:
    """Whether an interval excludes zero."""
    return change.low is not None and change.high is not None and not change.low <= 0 <= change.high


def headline(result: DemoResult) -> tuple[str, ...]:
    """The baseline, steering, the edit, and the verification, a paragraph each; what probes say is in `probe_wording`."""
    return (baseline(result.model, result.baseline), steering(result), editing(result), verification(result.agreement))


def baseline(model: str, run: Run) -> str:
    """How the unchanged model does."""
    short = run.summary["thoughts"]["short"]["value"]
    return (
        f"Unchanged, {model} gives the right answer in {percent(run.accuracy)} of {run.summary['replies']} replies to"
        f" questions that were used for nothing else. Its thoughts are {tokens(run.mean_thinking_tokens)} tokens long on"
        f" average; {percent(short)} of them are short: they stop before every step has been written once."
    )


def steering(result: DemoResult) -> str:
    """What adding the direction does, beside random directions."""
    curve, ratio = result.curve, result.curve.ratio(result.seed)
    first, last = curve.lengths[0], curve.lengths[-1]
    others = [length for control in result.controls for length in control.lengths if length is not None]
    closed = min(float(run.summary["thoughts"]["closed"]["value"] or 0) for run in curve.runs)
    by = (
        ""
        if ratio.low is None
        else f", a factor of {ratio.value:.1f} (95{SPACE}% interval {ratio.low:.1f} to {ratio.high:.1f})"
    )
    beyond = result.curve.slope_beyond(result.controls, result.seed)
    verdict = "" if clear(beyond) else " The slope cannot be told from that of the random directions."
    return (
        f"Adding the length direction to layers {', '.join(map(str, result.plan.layers))} with coefficients from"
        f" {curve.coefficients[0]:g} to {curve.coefficients[-1]:g} moves the mean thought from {tokens(first)} to"
        f" {tokens(last)} tokens{by}, and accuracy from {percent(curve.accuracies[0])} to {percent(curve.accuracies[-1])};"
        f" at every coefficient at least {percent(closed)} of the thoughts close. Random directions of the same norm give"
        f" thoughts of {tokens(min(others))} to {tokens(max(others))} tokens.{verdict}"
    ).replace("from -", "from −")


def editing(result: DemoResult) -> str:
    """What ThinkEdit does, beside random heads."""
    before, after, change = result.baseline, result.edit.run, result.change(result.edit)
    short = [run.summary["thoughts"]["short"]["value"] for run in (before, after)]
    total = result.scores.values.numel()
    controls = [percent(edit.run.accuracy) for edit in result.random_heads]
    beyond = result.beyond_random_heads()
    verdict = "" if clear(beyond) else " The gain over random heads cannot be told from chance on so few replies."
    return (
        f"Taking the direction out of what {len(result.edit.heads)} of the {total} attention heads can write (ThinkEdit)"
        f" takes the share of short thoughts from {percent(short[0])} to {percent(short[1])}"
        f" ({points(change.short_share)}), and accuracy from {percent(before.accuracy)} to {percent(after.accuracy)}"
        f" ({points(change.accuracy)}). The same edit of as many random other heads gives an accuracy of"
        f" {' and '.join(controls)}.{verdict}"
    )


def verification(found: Agreement) -> str:
    """Whether hook and checkpoint agree."""
    same = {True: "every byte is as the patch wants it", False: "bytes differ", None: "bytes were not compared"}
    verdict = "The two forms agree" if found.passed else "The two forms DO NOT agree"
    return (
        f"{verdict}: the edit was written as a checkpoint of {found.tensors} tensors, of which {found.patched} changed, and"
        f" {same[found.bytes_equal]}. Run as hooks on the unchanged model it gives the same logits but for {small(found.max_abs_logit_difference)};"
        f" rounding alone moves them by {small(found.floor)}."
    )
