"""Random controls: the same steering with directions that know nothing."""

from __future__ import annotations

from dataclasses import replace

from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import BiasRouter, Custom, Intervention, ScaleExperts
from steer.steering import Steering

APART = 1_000_003
"""Between the seeds of a steering's several directions, which would else be drawn alike."""


def random_control(steering: Steering, seed: int) -> Steering:
    """Return the steering with every direction replaced by a random one of equal norm in every layer.

    Sites, layers, phases, coefficients and heads stay, so what differs is where the vectors point.

    Args:
        steering: of `Add`, `ProjectOut` and `SetComponent`.
        seed: of the draw (`Direction.random_like`).

    Raises:
        SteerError: a `Custom` function takes part, or something without a direction.
    """
    steering.savable("has no random control")
    for each in steering.interventions:
        if isinstance(each, ScaleExperts | BiasRouter):
            raise SteerError(
                f"{type(each).__name__} has no direction, so none can be drawn at random",
                "Add, ProjectOut or SetComponent",
                "Take other experts as the control: ExpertScores.random or ExpertScores.matched",
            )
    drawn: dict[Direction, Direction] = {
        direction: direction.random_like(seed + APART * number) for number, direction in enumerate(steering.directions)
    }

    def controlled(intervention: Intervention) -> Intervention:
        assert not isinstance(intervention, Custom | ScaleExperts | BiasRouter)
        return replace(intervention, direction=drawn[intervention.direction])

    return replace(steering, interventions=tuple(map(controlled, steering.interventions)))
