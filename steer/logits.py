"""How two distributions over the vocabulary differ. Logits in, natural units (nats) out, arithmetic in fp32 or wider."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def _log_probabilities(logits: Float[Tensor, "*place vocab"]) -> Float[Tensor, "*place vocab"]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1)


def kl(p_logits: Float[Tensor, "*place vocab"], q_logits: Float[Tensor, "*place vocab"]) -> Float[Tensor, "*place"]:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, per place; infinite where q excludes what p allows.

    Args:
        p_logits: of the reference; -inf excludes a token.
        q_logits: of the changed model.

    Raises:
        ValueError: the shapes differ.
    """
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"logits of shapes {tuple(p_logits.shape)} and {tuple(q_logits.shape)}")
    log_p, log_q = _log_probabilities(p_logits), _log_probabilities(q_logits)
    terms = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp(min=0)


def entropy(logits: Float[Tensor, "*place vocab"]) -> Float[Tensor, "*place"]:
    """−Σ p log p in nats, per place."""
    log_p = _log_probabilities(logits)
    return -torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * log_p).sum(-1)


def entropy_bits(logits: Float[Tensor, "*place vocab"]) -> Float[Tensor, "*place"]:
    """`entropy` in bits."""
    return entropy(logits) / math.log(2)


@dataclass(frozen=True)
class LogitAgreement:
    """How two models' logits agree over all places.

    Attributes:
        max_difference: largest |difference| of two logits.
        mean_kl: mean KL(first ‖ second) in nats.
        top_1: share of places where both put the same token first.
        places: number of places compared.
    """

    max_difference: float
    mean_kl: float
    top_1: float
    places: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields as plain data."""
        return asdict(self)


def agreement(first: Float[Tensor, "*place vocab"], second: Float[Tensor, "*place vocab"]) -> LogitAgreement:
    """Compare the logits of two models on the same tokens.

    Raises:
        ValueError: the shapes differ, or there is no place to compare.
    """
    divergence = kl(first, second)
    if divergence.numel() == 0:
        raise ValueError("there are no places to compare")
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    a, b = first.to(wide), second.to(wide)
    difference = torch.where(a == b, torch.zeros_like(a), a - b)  # Two infinities are equal.
    same = (a.argmax(-1) == b.argmax(-1)).double().mean()
    return LogitAgreement(
        float(difference.abs().max()), float(divergence.double().mean()), float(same), divergence.numel()
    )
