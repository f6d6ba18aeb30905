"""Checkpoints on disk: plan a patch from headers, stream it into a new folder, take it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.checkpoint.apply import Edited as Edited
    from edits.checkpoint.apply import edited_bytes as edited_bytes
    from edits.checkpoint.compare import OnDisk as OnDisk
    from edits.checkpoint.expect import pin as pin
    from edits.checkpoint.manifest import Manifest as Manifest
    from edits.checkpoint.plan import Plan as Plan
    from edits.checkpoint.plan import plan as plan
    from edits.checkpoint.revert import revert as revert
    from edits.checkpoint.write import OutTensor as OutTensor
    from edits.checkpoint.write import write_checkpoint as write_checkpoint

export(
    __name__,
    {
        "Edited": "edits.checkpoint.apply",
        "Manifest": "edits.checkpoint.manifest",
        "OnDisk": "edits.checkpoint.compare",
        "OutTensor": "edits.checkpoint.write",
        "Plan": "edits.checkpoint.plan",
        "edited_bytes": "edits.checkpoint.apply",
        "pin": "edits.checkpoint.expect",
        "plan": "edits.checkpoint.plan",
        "revert": "edits.checkpoint.revert",
        "write_checkpoint": "edits.checkpoint.write",
    },
)
