"""Change weights: make patches, write them into checkpoints, take them back, measure that the forms agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.arithmetic import ReasoningVector as ReasoningVector
    from edits.arithmetic import reasoning_vector as reasoning_vector
    from edits.checkpoint.proof import prove as prove
    from edits.checkpoint.revert import revert as revert
    from edits.compatibility import compatibility as compatibility
    from edits.diff import diff as diff
    from edits.donors import as_patch as as_patch
    from edits.experts import expert_patch as expert_patch
    from edits.lora.export import export_lora as export_lora
    from edits.lora.extract import extract_lora as extract_lora
    from edits.merge import merge as merge
    from edits.thinkedit import thinkedit as thinkedit
    from edits.valve import beta_of as beta_of
    from edits.valve import valve as valve
    from edits.verify import verify as verify

export(
    __name__,
    {
        "ReasoningVector": "edits.arithmetic",
        "as_patch": "edits.donors",
        "beta_of": "edits.valve",
        "compatibility": "edits.compatibility",
        "diff": "edits.diff",
        "prove": "edits.checkpoint.proof",
        "expert_patch": "edits.experts",
        "reasoning_vector": "edits.arithmetic",
        "merge": "edits.merge",
        "revert": "edits.checkpoint.revert",
        "export_lora": "edits.lora.export",
        "extract_lora": "edits.lora.extract",
        "thinkedit": "edits.thinkedit",
        "valve": "edits.valve",
        "verify": "edits.verify",
    },
)
