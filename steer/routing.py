"""The choice of experts: what a router returns, and the family's own rule applied to any logits.

A router computes `logits = W h (+ bias)` and then follows its family's rule: softmax or sigmoid, the best k or the best k
of the best groups, normalised or not, scaled or not. The block that called it uses the ids and weights and ignores the
logits, so a change of the logits has to go through the rule again; `Chooser` does that. Experts go by their logical ids, the
rows of the router's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer.anatomy.modules import in_memory
from steer.errors import SteerError

SELECTION_BIAS = "e_score_correction_bias"
"""What DeepSeek V3 and its heirs call the buffer that is added to the scores for the choice, and not for the weights."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens are sent.

    Attributes:
        ids: the chosen experts, (batch, token, chosen).
        weights: what each one's output is multiplied by, after every write, in the dtype in which the router returns it.
    """

    ids: Int[Tensor, "batch token chosen"]
    weights: Float[Tensor, "batch token chosen"]


@runtime_checkable
class Listener(Protocol):
    """What is called with every choice that is heard, in the pass, on the device, after all writes.

    `states` (batch, token) holds `steer.phases.State` per position, or is None where nobody follows the positions.
    """

    def __call__(self, layer: int, routing: Routing, states: Tensor | None) -> None: ...


def chosen(
    output: Any, where: str
) -> tuple[Float[Tensor, "token experts"], Float[Tensor, "token chosen"], Int[Tensor, "token chosen"]]:
    """Return logits, weights and ids from what a router returns, one row per token.

    Families return (logits, weights, ids) or (ids, weights, logits): the ids are the whole numbers, the weights stand in
    the middle.

    Raises:
        SteerError: it returned something else.
    """
    parts = list(output) if isinstance(output, tuple | list) else []
    tensors = [part for part in parts if isinstance(part, Tensor)]
    ids = [part for part in tensors if not part.is_floating_point()]
    if (
        len(parts) != 3
        or len(tensors) != 3
        or len(ids) != 1
        or tensors[1] is ids[0]
        or tensors[1].shape != ids[0].shape
    ):
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in tensors) or type(output).__name__
        raise SteerError(
            f"the router of {where} returned {shapes}",
            "the ids of the chosen experts, their weights and the logits",
            "Use a transformers version that this family's record was read off",
        )
    logits = tensors[0] if tensors[2] is ids[0] else tensors[2]
    flat = [part.reshape(-1, part.shape[-1]) for part in (logits, tensors[1], ids[0])]
    return flat[0], flat[1], flat[2].long()


def returned(
    output: Sequence[Tensor], weights: Tensor, ids: Tensor | None = None, logits: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Put what was changed, in any leading shape, in the place, shape and dtype that it had in what the router returned."""
    parts = (logits, weights, ids) if output[0].is_floating_point() else (ids, weights, logits)
    return tuple(
        old if new is None else new.reshape(old.shape).to(old.dtype) for new, old in zip(parts, output, strict=True)
    )


class Chooser:
    """A family's own choice of experts, from logits that somebody else made.

    Every family of transformers 5.17 computes `F.linear(h, weight)`, some with a bias, and then its rule. So a copy of the
    router whose weight is the identity and whose bias is zero applies the rule to what it is given. The copy shares
    nothing that is written to, and is called past all hooks. `steer.anatomy.router_check` proves it once per router.

    Args:
        router: of one layer.
        where: its name, for messages.

    Raises:
        SteerError: the router has no plain matrix (experts, hidden).
    """

    def __init__(self, router: nn.Module, where: str) -> None:
        self.router, self.where = router, where
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise SteerError(
                f"the router of {where}, a {type(router).__name__}, has no plain matrix (experts, hidden)",
                "one, so that the family's choice can be made again from other logits",
                "Load the model with its routers unquantised",
            )
        self.experts = weight.shape[0]
        self._copies: dict[tuple[torch.dtype, torch.device], nn.Module] = {}

    def __call__(
        self, logits: Float[Tensor, "token experts"], selection: Float[Tensor, "token experts"] | None = None
    ) -> tuple[Float[Tensor, "token chosen"], Int[Tensor, "token chosen"]]:
        """Return weights and ids.

        Args:
            logits: in the precision in which the rule is to be followed.
            selection: takes the place of the router's selection bias, token by token; None leaves that as it is.
        """
        router = self._copy(logits.dtype, logits.device)
        bias = self.selection_bias
        if bias is not None:
            setattr(router, SELECTION_BIAS, bias.to(logits.device) if selection is None else selection)
        output = type(self.router).forward(router, logits)
        _, weights, ids = chosen(output, self.where)
        return weights, ids

    @property
    def selection_bias(self) -> Float[Tensor, " experts"] | None:
        """What the family adds to the scores for the choice only; None where it adds nothing."""
        with in_memory(self.router):
            found: Tensor | None = getattr(self.router, SELECTION_BIAS, None)
            return found if found is None else found.detach()

    def _copy(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        if (dtype, device) not in self._copies:
            given: dict[str, Any] = {"weight": torch.eye(self.experts, dtype=dtype, device=device)}
            if self.router._parameters.get("bias") is not None:
                given["bias"] = torch.zeros(self.experts, dtype=dtype, device=device)
            if hasattr(self.router, "hidden_dim"):
                given["hidden_dim"] = self.experts
            new, replaced = copy(self.router), (*given, SELECTION_BIAS)
            new._parameters = {name: part for name, part in self.router._parameters.items() if name not in replaced}
            new._buffers = {name: part for name, part in self.router._buffers.items() if name not in replaced}
            for name, part in given.items():
                setattr(new, name, part)
            self._copies[dtype, device] = new
        return self._copies[dtype, device]
