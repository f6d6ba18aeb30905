"""sibling + alpha * (tuned - supervised): accuracy follows alpha, random vectors as large leave it where it was.

The base never saw either donor (docs/organism.md). A random vector has the vector's Frobenius norm in every tensor.
Replies are to the same questions with the same random streams; intervals are paired over questions. Margins lie well
inside what 200 questions showed (docs/editing_weights.md): .17 .33 .46 .57 .64, random vectors between .45 and .47.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import edits
import steer
from edits.arithmetic import ReasoningVector
from experiments.curve import Curve
from experiments.run import Run
from experiments.vectors import ALPHAS, BASE, SEEDS, SUPERVISED, TUNED, Bench, change, vector_curve
from steer import SteerableModel

pytestmark = pytest.mark.effects

QUESTIONS, SAMPLES = 100, 4
ENDS = (ALPHAS[0], 0.0, ALPHAS[-1])


class Vectors:
    """The curves that more than one test reads; workers of pytest-xdist share the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bench = folder, Bench(folder, QUESTIONS, SAMPLES)
        self.vector = edits.reasoning_vector(TUNED, SUPERVISED)

    def ask(self, model: SteerableModel, name: str) -> Run:
        with FileLock(self.folder / f"{name}.lock"):
            return self.bench(model, name)

    def model(self, dtype: torch.dtype | None = None) -> SteerableModel:
        return steer.load(BASE, dtype=dtype)

    @cached_property
    def base(self) -> SteerableModel:
        return self.model()

    @cached_property
    def plain(self) -> Run:
        return self.ask(self.base, "plain")

    def curve(self, vector: ReasoningVector, name: str, alphas: tuple[float, ...]) -> Curve:
        return vector_curve(self.base, vector, name, alphas, self.plain, self.ask)

    @cached_property
    def main(self) -> Curve:
        return self.curve(self.vector, "vector", ALPHAS)

    @cached_property
    def controls(self) -> list[Curve]:
        return [self.curve(self.vector.random_like(seed), f"random-{seed}", ENDS) for seed in SEEDS]

    @cached_property
    def half(self) -> Curve:
        rounded = self.model(torch.bfloat16)
        plain = self.ask(rounded, "bfloat16-plain")
        return vector_curve(rounded, self.vector, "bfloat16", ENDS[1:], plain, self.ask)


@pytest.fixture(scope="session")
def vectors(shared_folder: Callable[[str], Path]) -> Vectors:
    return Vectors(shared_folder("vectors"))


@pytest.mark.parametrize("alpha", [-1.0, 0.5])
def test_what_runs_is_the_sum_in_float64_rounded_once(vectors: Vectors, alpha: float) -> None:
    tuned, supervised = (steer.load(name).hf.state_dict() for name in (TUNED, SUPERVISED))
    before = {name: value.double() for name, value in vectors.base.hf.state_dict().items()}
    with vectors.base.with_(vectors.vector.patch(), coefficient=alpha).active():
        for name, found in vectors.base.hf.state_dict().items():
            wanted = before[name] + alpha * (tuned[name].double() - supervised[name].double())
            assert torch.equal(found, wanted.float()), name


def test_controls_are_as_large_in_every_tensor_and_point_elsewhere(vectors: Vectors) -> None:
    wanted = vectors.vector.norms()
    for seed in SEEDS:
        random = vectors.vector.random_like(seed)
        assert random.norms() == pytest.approx(wanted)
        assert abs(random.cosine(vectors.vector) or 0.0) < 0.01


def test_accuracy_follows_alpha(vectors: Vectors) -> None:
    """From step to step, at both ends by a margin, and as a slope."""
    runs = vectors.main.runs
    for before, after in pairwise(runs):
        step = change(before, after)
        assert step.low is not None
        assert step.low > 0, f"accuracy changes by {step}"
    less, more = change(vectors.plain, runs[0]), change(vectors.plain, runs[-1])
    assert less.high is not None and more.low is not None
    assert less.high < -0.15, f"alpha -1 changes accuracy by {less}"
    assert more.low > 0.08, f"alpha 1 changes accuracy by {more}"
    rise = vectors.main.rise()
    assert rise.low is not None
    assert rise.low > 0.15, f"{rise} per unit of alpha"


@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_a_random_vector_of_equal_norm_stays_flat(vectors: Vectors, index: int) -> None:
    control = vectors.controls[index]
    for end in (0, -1):
        moved, ours = (change(vectors.plain, curve.runs[end]) for curve in (control, vectors.main))
        assert moved.low is not None and moved.high is not None and ours.value is not None
        assert max(abs(moved.low), abs(moved.high)) < 0.06 < abs(ours.value), f"{moved} against {ours}"
    flat, rise = control.rise(), vectors.main.rise()
    assert flat.high is not None and rise.low is not None
    assert flat.high < rise.low - 0.1, f"{flat} against {rise}"


def test_the_rise_lies_beyond_the_mean_of_the_controls(vectors: Vectors) -> None:
    ends = Curve("vector", ENDS, (vectors.main.runs[0], vectors.plain, vectors.main.runs[-1]))
    beyond = ends.rise_beyond(vectors.controls)
    assert beyond.low is not None
    assert beyond.low > 0.15, f"{beyond} per unit of alpha"


def test_thoughts_grow_and_close(vectors: Vectors) -> None:
    slope = vectors.main.slope()
    assert slope.low is not None
    assert slope.low > 2.0, f"{slope} tokens per unit of alpha"
    for run in vectors.main.runs:
        assert (run.replies.mean(run.replies.closed).value or 0) >= 0.98


def test_the_largest_layer_alone_does_only_a_part_of_it(vectors: Vectors) -> None:
    norms = vectors.vector.by_layer().layers()
    largest = max(norms, key=lambda layer: norms[layer])
    alone = vectors.ask(vectors.base.with_(vectors.vector.masked(layers=[largest]).patch()), f"alone-{largest}")
    part, rest = change(vectors.plain, alone), change(alone, vectors.main.runs[-1])
    assert part.low is not None and rest.low is not None
    assert part.low > 0, f"layer {largest} alone changes accuracy by {part}"
    assert rest.low > 0.05, f"the other layers add {rest}"


def test_in_bfloat16_the_same_rises(vectors: Vectors) -> None:
    rise = vectors.half.rise()
    assert rise.low is not None
    assert rise.low > 0.08, f"{rise} from alpha 0 to 1"
    moved = change(vectors.main.runs[-1], vectors.half.runs[-1])
    assert moved.low is not None and moved.high is not None
    assert moved.low > -0.06 and moved.high < 0.06, f"bfloat16 changes accuracy by {moved}"


def test_what_bfloat16_keeps_is_told_and_is_what_the_model_holds(vectors: Vectors) -> None:
    """The share told beside the curve against the numbers that are really in memory."""
    model = vectors.model(torch.bfloat16)
    before = {name: value.double() for name, value in model.hf.state_dict().items()}
    told = vectors.vector.survival(BASE, torch.bfloat16)
    with model.with_(vectors.vector.patch()).active():
        after = {name: value.double() for name, value in model.hf.state_dict().items()}
    with model.with_(vectors.vector.patch()).active():
        assert all(torch.equal(value.double(), after[name]) for name, value in model.hf.state_dict().items())
    unchanged = sum(int((after[row.matrix.module] == before[row.matrix.module]).sum()) for row in told.rows)
    numbers = sum(row.wanted_numbers for row in told.rows)
    assert told.total.cosine is not None and told.total.cosine > 0.995
    assert told.unchanged == pytest.approx(unchanged / numbers, abs=0.01)


def test_less_of_a_smaller_difference_survives(vectors: Vectors) -> None:
    """As with differences that reinforcement learning leaves: bfloat16 keeps most of this vector, not of a hundredth."""
    kept = [vectors.vector.survival(BASE, torch.bfloat16, alpha) for alpha in (1.0, 0.1, 0.01)]
    cosines, unchanged = [found.total.cosine for found in kept], [found.unchanged for found in kept]
    assert cosines == sorted(cosines, reverse=True) and cosines[-1] < 0.6
    assert unchanged == sorted(unchanged) and unchanged[-1] > 0.5
