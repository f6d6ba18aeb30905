"""Merging: mergekit's recipes, streamed from the models' files to a new checkpoint in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.merge.plan import MergePlan as MergePlan
    from edits.merge.plan import plan as plan
    from edits.merge.recipe import Recipe as Recipe
    from edits.merge.recipe import ada_r1 as ada_r1
    from edits.merge.recipe import read_recipe as read_recipe
    from edits.merge.run import Merged as Merged
    from edits.merge.run import merge as merge

export(
    __name__,
    {
        "Merged": "edits.merge.run",
        "MergePlan": "edits.merge.plan",
        "Recipe": "edits.merge.recipe",
        "ada_r1": "edits.merge.recipe",
        "merge": "edits.merge.run",
        "plan": "edits.merge.plan",
        "read_recipe": "edits.merge.recipe",
    },
)
