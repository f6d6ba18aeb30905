"""How a token is chosen from logits, and the random stream of a sequence.

One uniform number in [0, 1) per step of a sequence, from a counter-based generator (Philox 4x64, Salmon et al. 2011)
keyed by a hash of (seed, item, sample), and one inversion of the cumulative distribution in fp64. So what is sampled
for one sequence does not depend on its neighbours in the batch, up to the rounding of the logits themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import SteerError
from steer.identity import canonical

_HEAD = 1024  # Tokens looked at first for top-p; the whole vocabulary is sorted only where they do not suffice.


class BrokenLogitsError(SteerError):
    """The model returned logits that are no numbers, so nothing can be sampled."""


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler, applied in this order: temperature, top-k, top-p.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: keep the fewest likely tokens whose probabilities sum to at least this; 1 keeps all.
        top_k: keep this many; 0 keeps all.
        max_new_tokens: longest reply, its end token included.

    Raises:
        SteerError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value, fits, range_ in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
        ):
            if not fits:
                raise SteerError(f"the sampling option {name} is {value}", range_)

    @classmethod
    def of(cls, model: Any) -> Sampling:
        """What the model's card (organisms) or `generation_config` asks for; greedy where it does not ask for sampling."""
        card = getattr(model, "card", None) or {}
        told = _generation_config(model)
        longest = card.get("max_new_tokens") or told.max_new_tokens or cls.max_new_tokens
        if card.get("temperature") is not None:
            return cls(temperature=float(card["temperature"]), max_new_tokens=int(longest))
        if not told.do_sample:
            return cls(temperature=0.0, max_new_tokens=int(longest))
        temperature = 1.0 if told.temperature is None else float(told.temperature)
        return cls(temperature, 1.0 if told.top_p is None else float(told.top_p), int(told.top_k or 0), int(longest))

    def to_dict(self) -> dict[str, float | int]:
        """The fields as plain data."""
        return asdict(self)


def uniforms(seed: int, item: str, sample: int, count: int) -> NDArray[np.float64]:
    """The first `count` numbers in [0, 1) of a sequence's random stream."""
    key = hashlib.blake2b(canonical([seed, item, sample]).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(
    logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"], sampling: Sampling
) -> Int[Tensor, " batch"]:
    """One token per row.

    Args:
        logits: of the next token; -inf excludes a token.
        uniform: in [0, 1), one per row, fp64; not used at temperature 0.
        sampling: the options; `max_new_tokens` plays no part.

    Raises:
        BrokenLogitsError: logits that are no numbers, or rows without any possible token.
    """
    top = logits.amax(-1)
    if not bool(torch.isfinite(top).all()):
        raise BrokenLogitsError(
            "the model returned logits that are not numbers",
            "finite logits",
            "A steering that is too strong does this, in fp16 most easily; try a smaller coefficient",
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = (logits.double() - top[:, None].double()) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _invert(scaled.exp_(), uniform)
    weights, tokens = _likely(scaled, sampling)
    return tokens.gather(1, _invert(weights, uniform)[:, None])[:, 0]


def _likely(
    scaled: Float[Tensor, "batch vocab"], sampling: Sampling
) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, "batch kept"]]:
    """Unnormalised weights of the kept tokens (0 for those that top-p drops), likeliest first, and the tokens."""
    vocab = scaled.shape[1]
    if 0 < sampling.top_k < vocab:
        values, tokens = scaled.topk(sampling.top_k, dim=1)
        weights = values.exp_()
        return _nucleus(weights, weights.sum(1), sampling.top_p), tokens
    total = scaled.exp().sum(1)
    if vocab > _HEAD:
        values, tokens = scaled.topk(_HEAD, dim=1)
        weights = values.exp_()
        if bool((weights.sum(1) >= sampling.top_p * total).all()):
            return _nucleus(weights, total, sampling.top_p), tokens
    values, tokens = scaled.sort(dim=1, descending=True, stable=True)
    return _nucleus(values.exp_(), total, sampling.top_p), tokens


def _nucleus(weights: Tensor, total: Tensor, top_p: float) -> Tensor:
    """Keep a token where those before it do not yet reach `top_p`; the first is always kept."""
    if top_p == 1:
        return weights
    before = weights.cumsum(1) - weights
    return torch.where(before < top_p * total[:, None], weights, torch.zeros_like(weights))


def _invert(weights: Float[Tensor, "batch kept"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The first index whose cumulative weight exceeds uniform · total; never one of weight 0."""
    cumulative = weights.cumsum(1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.shape[1] - 1)


def _generation_config(model: Any) -> Any:
    """Of an engine's own, or of the Hugging Face model."""
    own = getattr(model, "generation_config", None)
    return model.hf.generation_config if own is None else own


def end_tokens(model: Any) -> frozenset[int]:
    """Ids that end a reply: the generation config's, else the tokenizer's; empty if neither names one."""
    told = _generation_config(model).eos_token_id
    if told is None:
        told = model.tokenizer.eos_token_id
    if told is None:
        return frozenset()
    several: Iterable[int] = [told] if isinstance(told, int) else told
    return frozenset(int(token) for token in several)
