"""Whether a model has the experts that an intervention names, and can choose as it says."""

from __future__ import annotations

from collections import Counter

from steer.anatomy.resolve import Anatomy
from steer.errors import SteerError
from steer.expert_interventions import BiasRouter, ScaleExperts
from steer.ranges import ranges


def check(intervention: ScaleExperts | BiasRouter, anatomy: Anatomy, what: str) -> None:
    """Refuse experts that are not there, and choices that no token can make.

    Args:
        intervention: what is done to a router.
        anatomy: of the model; how many experts a token chooses is unknown (0) where the user's own record does not say.
        what: the intervention, as messages call it.

    Raises:
        SteerError: see above.
    """
    if not anatomy.expert_layers and anatomy.record.experts is None:
        raise SteerError(
            f"{what} names experts, and this {anatomy.family} model is dense",
            "a mixture of experts",
            "Use Add, ProjectOut or SetComponent; `steer inspect MODEL` says what a model is made of",
        )
    if not anatomy.expert_layers:
        raise SteerError(
            f"{what} names experts, and no layer of this {anatomy.family} model has all of them in plain tensors",
            "experts that are not quantised",
            "Take the unquantised model",
        )
    for layer, expert in intervention.experts:
        if layer not in anatomy.expert_layers:
            raise SteerError(
                f"{what} names expert {expert} of layer {layer}, which has no experts",
                f"layers with experts: {ranges(anatomy.expert_layers)}",
                "Choose other layers",
            )
        if expert >= anatomy.experts:
            raise SteerError(
                f"{what} names expert {expert} of layer {layer}",
                f"experts 0 to {anatomy.experts - 1} of this model",
                "Choose other experts",
            )
    if isinstance(intervention, BiasRouter) and anatomy.chosen:
        _check_forced(intervention, anatomy)


def _check_forced(bias: BiasRouter, anatomy: Anatomy) -> None:
    """Refuse more experts forced in than a token chooses, or from more groups, and fewer left than it chooses."""
    size = anatomy.experts // anatomy.groups
    groups = Counter(layer for layer, _ in {(layer, expert // size) for layer, expert in bias.force_in})
    forced_in = Counter(layer for layer, _ in bias.force_in)
    for layer in bias.active_layers:
        if forced_in[layer] > anatomy.chosen:
            raise SteerError(
                f"BiasRouter forces {forced_in[layer]} experts of layer {layer} in",
                f"at most the {anatomy.chosen} that a token chooses",
                "Force fewer in, or add a bias, which only prefers",
            )
        if groups[layer] > anatomy.chosen_groups:
            raise SteerError(
                f"BiasRouter forces experts of {groups[layer]} groups of layer {layer} in",
                f"experts of at most {anatomy.chosen_groups} of its {anatomy.groups} groups, from which a token chooses",
                f"A group is {size} neighbouring experts: force experts of fewer groups in, or add a bias, which only prefers",
            )
        left = _left(bias, anatomy, layer)
        if left < anatomy.chosen:
            where = f", all in {anatomy.chosen_groups} of its {anatomy.groups} groups" if anatomy.groups > 1 else ""
            raise SteerError(
                f"BiasRouter forces so many of the {anatomy.experts} experts of layer {layer} out that a token finds {left}",
                f"at least the {anatomy.chosen} that it chooses{where}",
                "Force fewer out",
            )


def _left(bias: BiasRouter, anatomy: Anatomy, layer: int) -> int:
    """How many experts that are not forced out a token can find at most: in the groups of those forced in, and the fullest."""
    size = anatomy.experts // anatomy.groups
    out = Counter(expert // size for at, expert in bias.force_out if at == layer)
    home = {expert // size for at, expert in bias.force_in if at == layer}
    others = sorted((size - out[group] for group in range(anatomy.groups) if group not in home), reverse=True)
    return sum(size - out[group] for group in home) + sum(others[: anatomy.chosen_groups - len(home)])
