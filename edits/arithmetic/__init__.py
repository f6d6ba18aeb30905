"""Weight arithmetic: `base + alpha * (plus - minus)`, over checkpoints of any size (arXiv 2509.01363).

    v = edits.reasoning_vector("organism:chain-rl", "organism:chain-sft")
    v.norm(), v.by_layer().plot(), v.spectrum(8)
    with v.patch().on(sibling, scale=0.5): ...            # in memory
    v.patch().plan(folder).apply("out")                   # on disk

One file each: `vector` (the value), `selection` (masks), `pieces` (passes over files), `chance` (the random control),
`tables`, `spectrum`, `survive` (what it says of itself), `plots`.
"""

from edits.arithmetic.selection import Mask
from edits.arithmetic.vector import ReasoningVector, reasoning_vector

__all__ = ["Mask", "ReasoningVector", "reasoning_vector"]
