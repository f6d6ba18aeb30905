"""Checkpoints on disk: plan a patch from headers, stream it into a new folder, take it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.checkpoint.apply import Edited as Edited
    from edits.checkpoint.apply import pin as pin
    from edits.checkpoint.compare import OnDisk as OnDisk
    from edits.checkpoint.manifest import Manifest as Manifest
    from edits.checkpoint.plan import Plan as Plan
    from edits.checkpoint.plan import plan as plan
    from edits.checkpoint.undo import revert as revert

export(
    __name__,
    {
        "Edited": "edits.checkpoint.apply",
        "Manifest": "edits.checkpoint.manifest",
        "OnDisk": "edits.checkpoint.compare",
        "Plan": "edits.checkpoint.plan",
        "pin": "edits.checkpoint.apply",
        "plan": "edits.checkpoint.plan",
        "revert": "edits.checkpoint.undo",
    },
)
