"""Think policies: what the sampler does to the thinking. Each is a value that fulfils `steer.policy.Policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from experiments.think_policies.budget import ThinkingBudget as ThinkingBudget
    from experiments.think_policies.minimum import MinimumThinking as MinimumThinking
    from experiments.think_policies.parse import parse_policy as parse_policy
    from experiments.think_policies.switching import SwitchPenalty as SwitchPenalty

export(
    __name__,
    {
        "MinimumThinking": "experiments.think_policies.minimum",
        "SwitchPenalty": "experiments.think_policies.switching",
        "ThinkingBudget": "experiments.think_policies.budget",
        "parse_policy": "experiments.think_policies.parse",
    },
)
