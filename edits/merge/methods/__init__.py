"""Merge methods, one a file: the formula and its source, pure functions on float64 tensors.

Functions whose name ends with `_` use their inputs up, as torch's do: they are the same formula on one piece of a
tensor, in buffers that are used again for the next.
"""
