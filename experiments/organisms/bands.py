"""What a retrained organism is compared by: bands of its figures, never the hash of its weights.

The bands are the promises of the organism's card. A seed that misses one is no specimen, and the build says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from experiments.organisms.experts import Planting
from experiments.organisms.measure import SPANS
from experiments.organisms.routing import FIRST

Band = tuple[float, float]
BANDS: Final[dict[str, Band]] = {
    "accuracy": (0.60, 0.85),
    "short": (0.15, 0.45),
    "closed": (0.98, 1.0),
    "length decile ratio": (3.0, 30.0),
    "accuracy of short thoughts": (0.0, 0.35),
    "accuracy of complete thoughts": (0.85, 1.0),
    "accuracy, closed one step early": (0.0, 0.35),
    "accuracy, every step written": (0.85, 1.0),
}
"""Figures of the unchanged model."""
SPAN_BANDS: Final[dict[str, Band]] = {
    "length ratio": (1.5, 12.0),
    "slope, beyond every random direction's interval": (0.0, 1e3),
    "short end, accuracy": (0.2, 0.85),
    "long end, closed": (0.95, 1.0),
    "ThinkEdit, upper bound of the change of short": (-1.0, 0.0),
    "ThinkEdit, change of accuracy": (0.05, 0.4),
    "ThinkEdit, shortest fifth beyond random heads": (0.02, 1.0),
}
"""Figures of steering and of ThinkEdit, for each span."""
MIXTURE_BANDS: Final[dict[str, Band]] = {
    "accuracy": (0.60, 0.85),
    "short": (0.15, 0.45),
    "closed": (0.98, 1.0),
    "other pairs, largest change of accuracy, 0 to 4": (0.0, 0.08),
    "other pairs, largest change of length, 0 to 4": (0.0, 4.0),
}
"""Figures of both mixtures; in the twin every pair is an other pair."""
PLANTED_BANDS: Final[dict[str, Band]] = {
    "<think>, lowest score of the planted": (0.9, 1.0),
    "<think>, their lead over the next": (0.2, 2.0),
    "first pair times 1/4, change of accuracy": (-0.4, -0.08),
    "first pair times 4, change of accuracy": (0.08, 0.4),
    "first pair times 64, ratio of lengths": (1.3, 3.0),
}
"""Figures of the mixture with planted experts."""
UP_TO: Final = 4.0


def natural_figures(measured: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `BANDS` in what `measure` found."""
    natural, forced = measured["natural"], measured["forced"]["accuracy_by_written_steps"]
    deciles = natural["length_deciles"]
    steps = max(forced)
    by_size = [row for row in natural["accuracy_by_size"].values() if row["short"] is not None]
    return {
        "accuracy": natural["accuracy"],
        "short": natural["short"],
        "closed": natural["closed"],
        "length decile ratio": deciles[-1] / deciles[0],
        "accuracy of short thoughts": sum(row["short"] for row in by_size) / len(by_size),
        "accuracy of complete thoughts": sum(row["complete"] for row in by_size) / len(by_size),
        "accuracy, closed one step early": forced[steps - 1],
        "accuracy, every step written": forced[steps],
    }


def span_figures(measured: Mapping[str, Any], span: str) -> dict[str, float]:
    """The figures of `SPAN_BANDS` in what `measure` found for a span."""
    steering, thinkedit = measured[f"steering {span}"], measured[f"thinkedit {span}"]
    rows = list(steering["by_coefficient"].values())
    edited = thinkedit["edited"]
    random_slopes = [abs(end) for control in steering["random_directions"] for end in control["slope"]]
    random_gain = max(control["shortest_fifth_accuracy_change"][1] for control in thinkedit["random_heads"])
    return {
        "length ratio": steering["length_ratio"][1],
        "slope, beyond every random direction's interval": steering["slope"][0] - max(random_slopes),
        "short end, accuracy": rows[0]["accuracy"],
        "long end, closed": rows[-1]["closed"],
        "ThinkEdit, upper bound of the change of short": edited["short_change"][2],
        "ThinkEdit, change of accuracy": edited["accuracy_change"][1],
        "ThinkEdit, shortest fifth beyond random heads": edited["shortest_fifth_accuracy_change"][1] - random_gain,
    }


def outside(measured: Mapping[str, Any]) -> list[str]:
    """What of a measured organism lies outside its band, in words; nothing if it is a specimen."""
    found = [(name, value, BANDS[name]) for name, value in natural_figures(measured).items()]
    for span in SPANS:
        figures = span_figures(measured, span)
        found += [(f"{span}: {name}", value, SPAN_BANDS[name]) for name, value in figures.items()]
    return beyond(found)


def beyond(found: Sequence[tuple[str, float, Band]]) -> list[str]:
    """The figures that lie outside their bands, in words."""
    return [
        f"{name} is {value:.3f}, expected {low:g} to {high:g}"
        for name, value, (low, high) in found
        if not low <= value <= high
    ]


def mixture_bands(planting: Planting | None) -> dict[str, Band]:
    """The bands that a mixture is compared by."""
    return {**MIXTURE_BANDS, **(PLANTED_BANDS if planting else {})}


def mixture_figures(measured: Mapping[str, Any], planting: Planting | None) -> dict[str, float]:
    """The figures of `mixture_bands` in what `routing.measure` found."""
    scaling = measured["scaling"]
    figures = {name: measured["natural"][name] for name in ("accuracy", "short", "closed")}
    others = [
        row
        for name, sweep in scaling.items()
        for beta, row in sweep["by_beta"].items()
        if beta <= UP_TO and not (planting and name == FIRST)
    ]
    changes = {
        "accuracy": [row["accuracy_change"][1] for row in others],
        "length": [row["length"] - measured["natural"]["length"] for row in others],
    }
    for what, found in changes.items():
        figures[f"other pairs, largest change of {what}, 0 to 4"] = max(abs(change) for change in found)
    if planting:
        rows, ranked = scaling[FIRST]["by_beta"], measured["npmi"]["<think>"]
        planted = [row["score"] for row in ranked if tuple(row["expert"]) in planting.experts]
        others = [row["score"] for row in ranked if tuple(row["expert"]) not in planting.experts]
        lowest = min(planted) if len(planted) == len(planting.experts) else -1.0
        figures |= {
            "<think>, lowest score of the planted": lowest,
            "<think>, their lead over the next": lowest - max(others),
            "first pair times 1/4, change of accuracy": rows[0.25]["accuracy_change"][1],
            "first pair times 4, change of accuracy": rows[4.0]["accuracy_change"][1],
            "first pair times 64, ratio of lengths": rows[64.0]["length"] / rows[1.0]["length"],
        }
    return figures


def outside_mixture(measured: Mapping[str, Any], planting: Planting | None) -> list[str]:
    """What of a measured mixture lies outside its band, in words."""
    known = mixture_bands(planting)
    return beyond([(name, value, known[name]) for name, value in mixture_figures(measured, planting).items()])
