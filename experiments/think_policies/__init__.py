"""Think policies: what the sampler does to the thinking. Each is a value that fulfils `steer.policy.Policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from experiments.think_policies.budget import ThinkingBudget as ThinkingBudget
    from experiments.think_policies.parse import parse_policy as parse_policy

export(
    __name__,
    {
        "ThinkingBudget": "experiments.think_policies.budget",
        "parse_policy": "experiments.think_policies.parse",
    },
)
