"""Reading with vLLM: what a request wants to be kept of its rows, and what comes back.

A finished trace (prompt and reply) is sent as one prompt, so that every token of it has a row. The request says where its
spans lie, in token positions from its beginning; each worker adds up its own layers (`capture_worker`), and only sums
leave the device. Tokens out of the prefix cache have no rows, so a request that is read never takes any
(`skip_reading_prefix_cache`); whether all of its tokens were seen, once each, is checked at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
from jaxtyping import Float, Float64
from torch import Tensor

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.trace import Trace

KEY = "steering_capture"
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ROUTER = "router"
Place = tuple[str, int]
"""Site and layer; the site `router` stands for the choice of experts."""
Ranges = tuple[int, ...]
"""Start, stop, start, stop, and so on: half-open, rising, apart."""


@dataclass(frozen=True)
class Wanted:
    """What is to be kept of one request; travels as `extra_args["steering_capture"]`.

    Attributes:
        length: how many tokens are to be seen.
        prompt_length: how many of them are the trace's prompt, for the phases of a steering.
        means: the spans whose rows are added up, at every declared site.
        counts: the spans whose choices of experts are, in every declared layer.
        rows: whether every row comes back as well.
        key: under which it is fetched; no two requests have the same. Written by `capture_read.read`.
    """

    length: int
    prompt_length: int
    means: tuple[Ranges, ...] = ()
    counts: tuple[Ranges, ...] = ()
    rows: bool = False
    key: str = ""

    def __post_init__(self) -> None:
        for ranges in (*self.means, *self.counts):
            if len(ranges) % 2 or list(ranges) != sorted(set(ranges)) or (ranges and not 0 <= ranges[0] < ranges[-1] <= self.length):  # fmt: skip
                raise SteerError(
                    f"the ranges {list(ranges)[:8]} were to be read of {self.length} tokens",
                    "start, stop, start, stop: rising, within the tokens",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"means": [list(each) for each in self.means], "counts": [list(each) for each in self.counts]}  # fmt: skip

    @classmethod
    def from_dict(cls, plain: Any) -> Wanted:
        """The inverse of `to_dict`.

        Raises:
            SteerError: something is missing or unknown, or the ranges are none.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(plain, Mapping) or set(plain) != names:
            raise SteerError(f"a request has {KEY} = {plain!r}"[:400], "what SteeredLLM.read makes of a trace")
        spans = {name: tuple(tuple(map(int, each)) for each in plain[name]) for name in ("means", "counts")}
        return cls(**{**plain, **spans})


def whole(trace: Trace) -> Wanted:
    """Ask for every row of a trace."""
    return Wanted(len(trace.tokens), trace.prompt_length, rows=True)


def wanted_by(
    extra_args: Mapping[str, Any], places: Sequence[Place], tokens: int, skips_cache: bool | None
) -> Wanted | None:
    """Return what is to be kept of a request; None where nothing is.

    Args:
        extra_args: of the request.
        places: that the engine was started to read.
        tokens: of the prompt.
        skips_cache: whether vLLM computes every token again, `SamplingParams.skip_reading_prefix_cache`.

    Raises:
        SteerError: nothing can be read here, or not of every token.
    """
    if KEY not in extra_args:
        return None
    wanted = Wanted.from_dict(extra_args[KEY])
    if not places:
        raise SteerError("the request is to be read, and this engine was not started for reading", "an engine with capture=", "Use `steer collect --backend vllm`")  # fmt: skip
    if not skips_cache or wanted.length != tokens or wanted.prompt_length > tokens:
        raise SteerError(
            f"{wanted.length} tokens of a prompt of {tokens} are to be read, skip_reading_prefix_cache is {skips_cache}",
            "the whole prompt, and True: tokens out of the prefix cache have no rows",
            "Use SteeredLLM.read",
        )
    return wanted


def ranges_of(positions: Sequence[int]) -> Ranges:
    """Return rising positions as ranges."""
    if isinstance(positions, range) and positions.step == 1:
        return (positions.start, positions.stop) if positions else ()
    found = np.asarray(positions, dtype=np.int64)
    if not found.size:
        return ()
    gaps = np.flatnonzero(np.diff(found) != 1)
    starts, stops = found[np.r_[0, gaps + 1]], found[np.r_[gaps, -1]] + 1
    return tuple(np.stack([starts, stops], 1).ravel().tolist())


@dataclass(frozen=True, eq=False)
class Taken:
    """What was kept of one request, of all layers.

    Attributes:
        sums: place -> sum of the rows over each span of `Wanted.means`.
        counts: layer -> per span of `Wanted.counts`, how often each expert was chosen, then with what weight in sum.
        rows: place -> every row, in the model's dtype; empty unless asked for.
    """

    sums: Mapping[Place, Float64[Tensor, "span hidden"]] = field(repr=False)
    counts: Mapping[int, Float64[Tensor, "counted experts_twice"]] = field(repr=False)
    rows: Mapping[Place, Float[Tensor, "token hidden"]] = field(repr=False)


SUM, COUNT, ROW, SEEN = "sum", "count", "row", "seen"


def joined(parts: Iterable[bytes], length: int) -> Taken:
    """Join what the pipeline's stages kept of one request.

    Args:
        parts: of `capture_worker.Captured.take`, one for each stage.
        length: tokens that each must have seen.

    Raises:
        SteerError: nothing was kept, or not of every token.
    """
    found: dict[str, dict[Place, Tensor]] = {SUM: {}, COUNT: {}, ROW: {}}
    stages = 0
    for part in parts:
        tensors = safetensors.torch.load(part)
        seen = int(tensors.pop(SEEN))
        stages += 1
        if seen != length:
            raise SteerError(
                f"vLLM ran {seen} of the {length} tokens of a trace that is read",
                "every token, once",
                "Read with SteeredLLM.read, which asks vLLM not to take tokens from its prefix cache",
            )
        for name, tensor in tensors.items():
            kind, site, layer = name.split("/")
            found[kind][site, int(layer)] = tensor
    if not stages:
        raise SteerError(
            "vLLM kept nothing of a trace", "rows of the declared places", "Start the engine with capture="
        )
    return Taken(found[SUM], {layer: counts for (_, layer), counts in found[COUNT].items()}, found[ROW])


def name_of(kind: str, place: Place) -> str:
    """Return what a tensor is called on its way."""
    return f"{kind}/{place[0]}/{place[1]}"
