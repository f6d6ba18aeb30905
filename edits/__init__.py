"""Change weights: make patches, write them into checkpoints, take them back, measure that the forms agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.checkpoint.undo import revert as revert
    from edits.diff import diff as diff
    from edits.thinkedit import thinkedit as thinkedit
    from edits.verify import verify as verify

export(
    __name__,
    {
        "diff": "edits.diff",
        "revert": "edits.checkpoint.undo",
        "thinkedit": "edits.thinkedit",
        "verify": "edits.verify",
    },
)
