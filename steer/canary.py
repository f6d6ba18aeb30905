"""A canary: does steering do exactly what it says, on this machine, with these versions?

Adding v to `resid_pre` of the first layer is the same as adding v to the embeddings, which needs no hook. The two are
compared on a model, beside three things that are easily lost: that the steering changes the output at all, that
coefficient 0 changes not a bit, and that nothing stays behind on the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.directions import Direction
from steer.interventions import Add
from steer.model import SteerableModel
from steer.steering import Steering

TOKENS = 12
TOLERANCE = 1e-4  # of logits in float32; a wrong hook is off by the whole change.


@dataclass(frozen=True)
class Canary:
    """What one steering did.

    Attributes:
        change: max |steered − plain| over logits; 0 would mean that steering does nothing.
        error: max |steered − same change without hooks| over logits.
        positions: (layer, position) pairs that the report says were touched; 12 expected.
        zero_is_plain: coefficient 0 gave the plain logits bit by bit.
        left_behind: hooks that the model has after and did not have before.
    """

    change: float
    error: float
    positions: int
    zero_is_plain: bool
    left_behind: int

    @property
    def passed(self) -> bool:
        """Whether steering works here."""
        exact = self.error <= TOLERANCE < self.change
        return exact and self.positions == TOKENS and self.zero_is_plain and self.left_behind == 0


def sing(model: SteerableModel, seed: int = 0) -> Canary:
    """Steer `model` with a random direction as long as a typical embedding, and compare; one short forward each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.anatomy.vocab, (TOKENS,), generator=generator).tolist()
    embedding = model.places.embedding.get_parameter("weight").detach()
    vector = torch.randn(model.anatomy.hidden, generator=generator)
    vector *= embedding.float().norm(dim=-1).mean().cpu() / vector.norm()
    steering = Steering((Add(Direction(vector[None], (0,), "resid_pre", model.identity), "resid_pre"),))
    before = _hooks(model)
    plain = model.run([ids])[0]
    with model.steered(steering) as report:
        steered = model.run([ids])[0]
    with model.steered(steering, 0.0):
        zero = model.run([ids])[0]
    by_hand = _embedded(model, ids, vector)
    return Canary(
        change=float((steered - plain).abs().max()),
        error=float((steered - by_hand).abs().max()),
        positions=report.positions,
        zero_is_plain=torch.equal(zero, plain),
        left_behind=_hooks(model) - before,
    )


@torch.no_grad()
def _embedded(model: SteerableModel, ids: list[int], vector: Float[Tensor, " hidden"]) -> Float[Tensor, "token vocab"]:
    embedded: Tensor = model.places.embedding(torch.tensor([ids], device=model.device))
    changed = (embedded.float() + vector.to(model.device)).to(embedded.dtype)
    logits: Tensor = model.hf(inputs_embeds=changed).logits[0]
    return logits.float()


def _hooks(model: SteerableModel) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.hf.modules() for kind in kinds)
