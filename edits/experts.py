"""RICE as an edit of weights: turn chosen experts up, down or off in what they write (arXiv 2505.14681, section 3.2).

For an expert of a mixture with the output projection W and the bias b (where its family has one),

    W <- beta W,    b <- beta b

which multiplies what the expert writes for every token that chooses it, so it is the same function as multiplying its
weight after the choice, `ScaleExperts` without renormalisation: bit by bit where beta is a power of two. The paper's
beta is 64; 0 takes the experts out of the sum. Which experts a token chooses, and what every token passes (shared
experts), stay as they are in the edited layer. The edited checkpoint needs no special engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from steer.errors import SteerError
from steer.expert_interventions import Expert, ScaleExperts
from steer.identity import check_same
from steer.patches import Patch
from steer.steering import Steering
from steer.targets import target_of

if TYPE_CHECKING:
    from steer.expert_scores import ExpertScores
    from steer.model import SteerableModel

CONVENTION = "W_down, b_down <- beta W_down, beta b_down"


def expert_patch(
    experts: Iterable[Expert],
    beta: float,
    model: SteerableModel | str | Path,
    *,
    scores: ExpertScores | None = None,
) -> Patch:
    """Make the patch that scales what `experts` write by `beta`.

    Args:
        experts: (layer, expert) pairs, such as `scores.top(2)`; order does not matter.
        beta: at least 0, not 1; a power of two is exact in every dtype, and in MXFP4 nothing else is possible.
        model: a loaded model or a checkpoint, of which headers are read; says which experts have a bias.
        scores: that the experts were chosen by, of this model; noted in the provenance.

    Returns:
        A patch with one operation per expert, two where experts have biases.

    Raises:
        SteerError: beta is 1, negative or not finite; no expert, one twice or out of range; a dense model; scores of
            another model.
    """
    scaled = ScaleExperts(tuple(experts), beta)
    check_beta(beta)
    identity = target_of(model).identity
    if scores is not None and scores.model is not None:
        check_same(scores.model, identity, "the expert scores")
        identity = scores.model
    steering = Steering((scaled,), identity)
    story = {
        "convention": CONVENTION,
        "options": {"beta": scaled.beta, "experts": [list(pair) for pair in scaled.experts]},
        "parents": [steering.fingerprint, *([] if scores is None else [scores.fingerprint])],
    }
    return replace(Patch.from_steering(steering, model), provenance=story)


def check_beta(beta: float) -> None:
    """Refuse the factor that leaves everything as it is.

    Raises:
        SteerError: beta is 1.
    """
    if beta == 1:
        raise SteerError(
            "beta is 1, which leaves every expert as it is",
            "another factor of at least 0",
            "RICE uses 64; 0 takes the experts out of the sum",
        )
