"""The README's picture, drawn from a demo's `result.json`: the steering curve, the map of heads, the edit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError
from steer.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAIN, CONTROL, BEFORE, INK = "#1f5fa8", "#9aa1ab", "#6b7480", "#1d2126"


def draw(result: Path, picture: Path) -> None:
    """Draw a demo's result; a picture that exists is replaced.

    Raises:
        SteerError: the file is no result of a demo.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = _read(result)
    figure = Figure(figsize=(10.5, 3.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    length, accuracy, edit = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1, 1, 1.15)})
    _curve(length, found["steering"], "mean_thinking_tokens", "control_mean_thinking_tokens", 1.0)
    length.set(ylabel="tokens of thought", title="Steering: length of thought")
    _curve(accuracy, found["steering"], "accuracy", "control_accuracy", 100.0)
    accuracy.set(ylabel="right answers, %", ylim=(0, 100), title="Steering: accuracy")
    _edits(edit, found)
    for axes in (length, accuracy, edit):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=10.5, fontweight="bold", color=INK)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(picture, overwrite=True) as partial:
        figure.savefig(partial, dpi=160, format=picture.suffix.lstrip(".") or "png")


def _read(result: Path) -> dict[str, Any]:
    try:
        found = json.loads(result.read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SteerError(f"{result} cannot be read ({error})", "the result.json of a demo", "Run steer demo") from error
    if not isinstance(found, dict) or not {"steering", "thinkedit"} <= set(found):
        raise SteerError(f"{result} is no result of a demo", "the result.json of a demo", "Run steer demo")
    return found


def _curve(axes: Axes, steering: dict[str, Any], name: str, control: str, factor: float) -> None:
    at, values = steering["coefficients"], _scaled(steering[name], factor)
    ends = [_scaled([point[name][end] for point in steering["intervals"]], factor) for end in ("low", "high")]
    spread = [[value - low for value, low in zip(values, ends[0], strict=True)],
              [high - value for value, high in zip(values, ends[1], strict=True)]]  # fmt: skip
    axes.plot(
        at, _scaled(steering[control], factor), "--o", color=CONTROL, markersize=4, markerfacecolor="white",
        label="random directions of equal norm",
    )  # fmt: skip
    axes.errorbar(at, values, yerr=spread, fmt="-o", color=MAIN, markersize=5, linewidth=2, label="length direction")
    axes.set(xlabel="coefficient", xticks=at)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right" if factor > 1 else "upper left")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _scaled(values: list[float | None], factor: float) -> list[float]:
    """Values for matplotlib, which leaves a gap at NaN; a point at which no thought was finished has no length."""
    return [math.nan if value is None else factor * value for value in values]


def _edits(axes: Axes, found: dict[str, Any]) -> None:
    """Accuracy and short thoughts: unchanged, edited, random heads."""
    edit = found["thinkedit"]
    controls = [each for each in edit["edits"] if each["kind"] == "random heads"]
    bars = [
        ("unchanged", edit["accuracy_before"], edit["short_share_before"], BEFORE),
        ("random heads", edit["control_accuracy_after"], _mean([each["short_share"] for each in controls]), CONTROL),
        (f"ThinkEdit, {len(edit['heads'])} heads", edit["accuracy_after"], edit["short_share_after"], MAIN),
    ]  # fmt: skip
    for place, (label, accuracy, short, color) in enumerate(bars):
        for group, value in enumerate((accuracy, short)):
            if value is None:
                continue
            at = group + (place - 1) * 0.27
            axes.bar(at, 100 * value, 0.25, color=color, label=label if group == 0 else None)
            axes.text(at, 100 * value + 1.5, f"{100 * value:.0f}", ha="center", fontsize=8, color=INK)
    axes.set(xticks=(0, 1), xticklabels=("right answers", "short thoughts"), ylabel="%", ylim=(0, 112))
    axes.set_title(f"What an edit of {len(edit['heads'])} heads does")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
