"""DARE (arXiv 2311.03099, §3; mergekit's `dare_linear` and `dare_ties`): drop entries at random and rescale the rest.

Each entry of delta_i = theta_i - base is kept with probability p = density, independently; what is kept is multiplied
by a factor:

    rescale true (mergekit's default)   ‖delta_i‖_1 / ‖kept‖_1, per tensor
    rescale "density" (the paper)       1 / p, so that the expectation is delta_i
    rescale false                       1

`dare_linear` adds lambda sum_i w_i (kept), `dare_ties` what `consensus` agrees on; `normalize` is false for both.

Ours: mergekit draws masks from one global stream, so they change with the order of its schedule. Here the mask of a
tensor follows from (seed, its name, the model's place in the recipe) alone: PCG64 seeded with their SHA-256, one draw
of 64 bits an entry in storage order, of which the upper 53 are compared with p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from edits.merge.methods import task_arithmetic
from edits.merge.methods.consensus import agreed_
from edits.merge.methods.sums import magnitude, ratio

Rescale = bool | str


def dare(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    name: str,
    seed: int = 0,
    consensus: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: Rescale = True,
) -> Float[Tensor, "*shape"]:
    """Merge one tensor.

    Args:
        base: what differences are taken from, float64.
        models: the tensor of each model, float64.
        weights: one per model; 0 leaves the model out.
        densities: probability that an entry is kept, per model.
        name: of the tensor; decides the masks together with `seed`.
        seed: decides the masks.
        consensus: elect signs, which is `dare_ties`; else `dare_linear`.
        normalize: divide by the weights (of those that agree, with `consensus`).
        scale: lambda.
        rescale: true, "density" or false; see above.
    """
    deltas, used = [], []
    for place, (model, weight, density) in enumerate(zip(models, weights, densities, strict=True)):
        if weight == 0 or scale == 0:
            continue
        delta = model - base
        flat = delta.reshape(-1)
        chance = factor(lambda flat=flat: iter([flat]), Mask(seed, name, place, density), rescale)  # type: ignore[misc]
        drop_(flat, Mask(seed, name, place, density), chance)
        deltas.append(delta)
        used.append(weight)
    if not deltas:
        return base.clone()
    if consensus:
        return agreed_(deltas, used, normalize, scale).add_(base)
    divisor = task_arithmetic.divisor(weights, normalize)
    return task_arithmetic.change_(deltas, used, divisor, scale).add_(base)


class Mask:
    """The entries of one difference that are kept, drawn in storage order.

    Args:
        seed: of the recipe.
        name: of the tensor.
        place: of the model among those that are not the base, from 0.
        density: probability that an entry is kept.
    """

    def __init__(self, seed: int, name: str, place: int, density: float) -> None:
        self.origin, self.density = (seed, name, place), density
        state = hashlib.sha256(f"dare\0{seed}\0{name}\0{place}".encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(state, "little"))

    def next(self, count: int) -> Bool[Tensor, " count"]:
        """Draw the next `count` entries."""
        if self.density >= 1:
            return torch.ones(count, dtype=torch.bool)
        drawn = self._bits.random_raw(count) >> np.uint64(11)
        return torch.from_numpy(drawn < np.uint64(int(self.density * (1 << 53))))

    def again(self) -> Mask:
        """Return the same mask from its beginning."""
        return Mask(*self.origin, self.density)


def factor(deltas: Callable[[], Iterator[Tensor]], mask: Mask, rescale: Rescale) -> float:
    """Return what kept entries are multiplied by.

    Args:
        deltas: begins the pieces of the difference anew at each call; read for the norms of `rescale` true only.
        mask: at its beginning; drawn from.
        rescale: see above.
    """
    if rescale is False or mask.density >= 1 or mask.density == 0:
        return 1.0
    if rescale == "density":
        return 1.0 / mask.density
    before, after = [], []
    for delta in deltas():
        sizes = delta.abs()
        before.append(magnitude(sizes))
        after.append(magnitude(sizes.mul_(mask.next(delta.numel()))))
    return ratio(before, after)


def drop_(delta: Float[Tensor, " n"], mask: Mask, chance: float) -> Float[Tensor, " n"]:
    """Set the dropped entries of the next piece to 0 and multiply the others by `chance`, in place."""
    if mask.density < 1:
        delta.mul_(mask.next(delta.numel()))
    return delta.mul_(chance) if chance != 1.0 else delta
