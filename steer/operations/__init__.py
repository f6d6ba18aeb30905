"""Operations on one matrix, and the one function that carries them out.

`edit_` is the only code that changes weights: a loaded model (`Patch.on`) and a checkpoint on disk
(`edits.checkpoint`) both call it, so the two can be compared byte by byte; `low_rank` says the same change as
factors, for the hook form and for adapters.

It works on one piece of a matrix at a time, copied to the CPU in float64. It uses only element by element operations
and a fixed tree of additions, all rounded as IEEE 754 says; hence its bytes depend on the weight and the operations
alone, not on the bounds of the pieces, the alignment of the memory, the number of threads, the BLAS or the device.
The result is cast to the weight's dtype once, at the end.

`operation` says what an operation is; each has its own file; `edit` carries them out, `factors` says them as A and B,
`stored` as a file holds them.
"""

from steer.anatomy.slots import Matrix
from steer.operations.add_bias import AddBias
from steer.operations.add_dense import AddDense
from steer.operations.add_low_rank import AddLowRank
from steer.operations.edit import Block, Survival, edit_, edited, edited_blocks
from steer.operations.factors import low_rank
from steer.operations.operation import DTYPES, Operation, Region, Source, reduces, region, tensor_hash
from steer.operations.project import ProjectColumns
from steer.operations.scale import Scale
from steer.operations.set_slice import SetSlice

__all__ = [
    "DTYPES", "AddBias", "AddDense", "AddLowRank", "Block", "Matrix", "Operation", "ProjectColumns", "Region", "Scale",
    "SetSlice", "Source", "Survival", "edit_", "edited", "edited_blocks", "low_rank", "reduces", "region",
    "tensor_hash",
]  # fmt: skip
