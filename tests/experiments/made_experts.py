"""A result of the demo on the mixture of experts, made by hand, so that the words of any outcome can be tried without a model."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from edits.agreement import Agreement
from experiments.demo_experts import ExpertPlan
from experiments.demo_experts_result import ExpertDemoResult, Scaled, Twin
from experiments.run import Run
from steer.expert_scores import ExpertScores
from steer.scored_markers import ScoredMarker
from tests.experiments.made import run

QUESTIONS = 40
BELOW = {f"q{n:03d}": 20 for n in range(QUESTIONS)}
AGREEMENT = Agreement("a", "b", True, True, 112, 2, (), 0.0, 1e-12, 1.0, 100, 1e-5, None, 3e-5)
PLAN = ExpertPlan(
    betas=(0.0, 1.0, 4.0, 64.0),
    control_betas=(1.0, 4.0, 64.0),
    twin_betas=(1.0, 4.0),
    questions=QUESTIONS,
    fit_questions=QUESTIONS,
)


@cache
def random_run(seed: int, right: float = 0.6, longer: int = 0, silent: float = 0.0) -> Run:
    """A run whose share of right answers is about `right`; a share `silent` never closes."""
    rng = np.random.default_rng(seed)
    lengths = [None if rng.random() < silent else int(rng.integers(8, 60) + longer) for _ in range(QUESTIONS)]
    made = run(lengths, [bool(rng.random() < right) for _ in lengths], BELOW)
    identity = {"name": "made", "family": "qwen3_moe", "shape_id": "s", "weights_id": "w", "tokenizer_id": "t"}
    made.traces.meta.update(model=identity, sampling={"temperature": 0.8})
    return made


def scores(best: float = 2.0, following: float = 0.5, chance: float = 1e-9) -> ExpertScores:
    """Scores of eight experts in layers 2 and 3: (3, 1) and (2, 0) first, (2, 2) next, (3, 3) never chosen."""
    values = torch.tensor([[best - 0.1, -0.4, following, -1.0], [0.0, best, -0.2, float("nan")]])
    p = torch.tensor([[chance, 0.7, 0.02, 0.9], [0.5, chance / 2, 0.8, float("nan")]], dtype=torch.float64)
    q = (4 * p).clamp(max=1.0)
    chosen = torch.tensor([[20, 700, 300, 980], [990, 20, 990, 0]])
    together = torch.stack([torch.tensor([[40, 0, 10, 30], [40, 20, 20, 0]]), torch.tensor([[0, 30, 10, 40], [40, 0, 40, 0]])])  # fmt: skip
    return ExpertScores(
        values,
        (2, 3),
        chosen,
        together.minimum(chosen),
        1000,
        (ScoredMarker("<think>", 1.0, 40), ScoredMarker("</think>", -1.0, 40)),
        "npmi",
        values - 0.05,
        values + 0.05,
        p,
        q,
    )


def result(**changes: object) -> ExpertDemoResult:
    """What was planted is found and helps; other pairs and the twin do nothing at 4 and do damage at 64."""
    plain, other = random_run(0), random_run(50)
    counted = scores()
    best, matched = counted.top(2), counted.matched(counted.top(2), 0)
    strong = random_run(3, 0.97, 20)
    found = Scaled("the experts found", "found", best, PLAN.betas, (random_run(1, 0.3, -5), plain, random_run(2, 0.95, 10), strong))  # fmt: skip
    controls = tuple(
        Scaled(name, kind, experts, PLAN.control_betas, (plain, plain, random_run(seed, 0.05)))
        for name, kind, experts, seed in (
            ("random pair 1", "random", ((2, 1), (2, 3)), 10),
            ("matched pair", "matched", matched, 11),
        )
    )
    twin_scores = scores(1.2, 0.4)
    own = Scaled("the twin's own experts", "twin", twin_scores.top(2), PLAN.twin_betas, (other, random_run(50)))
    made = ExpertDemoResult(
        out=Path("demo-moe"),
        model="organism:made",
        base_checkpoint=Path("base"),
        card={
            "marks": {"opening": "<think>", "closing": "</think>"},
            "planted": {"experts": [list(expert) for expert in best]},
        },
        plan=PLAN,
        seed=0,
        baseline=plain,
        fit=random_run(40),
        scores=counted,
        found=found,
        controls=controls,
        edited=strong,
        agreement=AGREEMENT,
        twin=Twin("organism:made-plain", twin_scores, own),
        seconds=12.34,
    )
    return replace(made, **changes)  # type: ignore[arg-type]
