"""Donors: what weight arithmetic takes numbers from. A donor is opened by its headers and read piece by piece.

A checkpoint gives its tensors; an adapter (LoRA) gives the dense product (alpha / r) B A, made when a piece of it is
asked for; a checkpoint with adapters gives their sum. So a difference of two adapters is B1 A1 - B2 A2, never
(B1 - B2)(A1 - A2), which is another matrix. Numbers come in float64 on the CPU, whatever they are stored in.
"""

from edits.donors.adapter import Adapted, Adapter, Place, as_patch
from edits.donors.checkpoint import TORCH, Checkpoint, piece
from edits.donors.donor import Donor, Shapes
from edits.donors.opening import donor

__all__ = ["TORCH", "Adapted", "Adapter", "Checkpoint", "Donor", "Place", "Shapes", "as_patch", "donor", "piece"]
