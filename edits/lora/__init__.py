"""LoRA adapters made from changes: exported from a patch, or extracted from two checkpoints (PEFT's file format)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from edits.lora.export import export_lora as export_lora
    from edits.lora.extract import extract_lora as extract_lora
    from edits.lora.folder import Adapter as Adapter

export(
    __name__,
    {
        "Adapter": "edits.lora.folder",
        "export_lora": "edits.lora.export",
        "extract_lora": "edits.lora.extract",
    },
)
