"""ThinkEdit: take a direction out of what chosen attention heads write (arXiv 2503.22048, §4, Eq. 6).

For the heads S of a layer with the length direction v of that layer (measured at `resid_mid`) and v̂ = v / ‖v‖,

    W_O[:, columns of S]  <-  (I - w v̂ v̂ᵀ) W_O[:, columns of S]

where the columns of head h are h·k to (h+1)·k and k = in_features / heads, which is not hidden / heads on every
family. Biases stay. v̂ is a unit vector; the sign and the length of v do not matter.

On families that put a norm between W_O and the residual stream (Gemma 2 and 3, OLMo 2), the norm rescales every
coordinate by its gain g, so v̂ itself remains in what is added. There `through_norm=True` projects out
û = (g⊙v) / ‖g⊙v‖ instead: with w = 1 the chosen heads' share of the component along v vanishes, and the rest of
the block's output is rescaled, since the norm divides by another root mean square.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artifacts import GIVEN
from steer.directions import Direction
from steer.errors import SteerError
from steer.identity import check_same
from steer.operations import Matrix, ProjectColumns
from steer.patches import Patch
from steer.writers import check_heads

if TYPE_CHECKING:
    from steer.model import SteerableModel


def thinkedit(
    direction: Direction,
    heads: Iterable[tuple[int, int]],
    weight: float = 1.0,
    *,
    model: SteerableModel | None = None,
    through_norm: bool = False,
) -> Patch:
    """Make the patch that keeps `heads` from writing along `direction`.

    Args:
        direction: one vector per layer, of the model's hidden size; the paper takes `resid_mid`.
        heads: (layer, query head) pairs, such as `head_scores(...).top(3)`; order does not matter.
        weight: w; 1 removes the component, 0.5 halves it.
        model: checks layers, heads and shape now instead of when the patch is used; needed for `through_norm`.
        through_norm: project û = (g⊙v)/‖g⊙v‖ with the gain g of the norm behind the projection; on families without
            such a norm û is v̂.

    Returns:
        A patch with one operation per layer.

    Raises:
        SteerError: no heads, a head twice or out of range, a layer without a direction or with a zero one, a direction
            per head, another model's shape, `through_norm` without a model.
    """
    pairs = [(int(layer), int(head)) for layer, head in heads]
    if not pairs:
        raise SteerError(
            "no heads were given, so the model would be left as it is",
            "at least one (layer, head)",
            "Take them from head scores, scores.top(3) or scores.share(0.04)",
        )
    if len(direction.width) != 1:
        raise SteerError(
            f"the direction was measured at {direction.site}, per head", "one vector of the hidden size per layer",
            "Measure it at resid_mid",
        )  # fmt: skip
    if through_norm and model is None:
        raise SteerError("through_norm was asked for without a model", "the model whose gains it takes", "Pass model=")
    if model is not None:
        _check(direction, pairs, model)
    operations = []
    for layer in sorted({layer for layer, _ in pairs}):
        vector = direction[layer]
        if through_norm and model is not None:
            vector = vector * gain(model, layer)
        chosen = tuple(head for at, head in pairs if at == layer)
        operations.append(ProjectColumns(layer, "attention_output", chosen, vector, weight))
    story = {key: value for key, value in direction.provenance.items() if key in GIVEN} | {
        "site": direction.site,
        "convention": "W_O[:, heads] <- (I - w u uᵀ) W_O[:, heads]",
        "options": {"weight": weight, "through_norm": through_norm, "heads": [list(pair) for pair in pairs]},
        "parents": [direction.fingerprint],
    }
    return Patch(tuple(operations), direction.model, provenance=story)


def gain(model: SteerableModel, layer: int) -> Float[Tensor, " hidden"]:
    """Return what the norm behind a layer's attention output multiplies each coordinate by, up to a common factor.

    It is measured, not read: on a vector of ones a root-mean-square norm returns its gain, whether the family stores
    it as `weight` or as `1 + weight`. Families without such a norm have gain 1.
    """
    contribution = model.anatomy.attention_contribution
    ones = torch.ones(model.anatomy.hidden)
    if contribution.kind != "norm":
        return ones
    path = f"{model.anatomy.record.model.layers}.{layer}.{contribution.norm}"
    norm = copy.deepcopy(model.hf.get_submodule(path)).to("cpu", torch.float32)
    with torch.no_grad():
        measured: Tensor = norm(ones[None, None])[0, 0]
    return measured.detach()


def _check(direction: Direction, pairs: list[tuple[int, int]], model: SteerableModel) -> None:
    anatomy = model.anatomy
    check_same(direction.model, model.identity, "the direction")
    wrong = [pair for pair in pairs if not (0 <= pair[0] < anatomy.layers and 0 <= pair[1] < anatomy.heads)]
    if wrong:
        raise SteerError(
            f"layer {wrong[0][0]}, head {wrong[0][1]} is out of range",
            f"layers 0 to {anatomy.layers - 1}, heads 0 to {anatomy.heads - 1}",
            "Check that the head scores belong to this model",
        )
    for layer, head in pairs:
        check_heads(anatomy, Matrix(layer, "attention_output"), (head,))
    if direction.width != (anatomy.hidden,):
        raise SteerError(
            f"the direction has {direction.width[0]} numbers", f"{anatomy.hidden}, the model's hidden size"
        )
