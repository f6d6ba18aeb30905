"""The worker's side of reading: buffers that layers write into during a step, and sums that are drawn from them after it.

    buffer (token of the step, hidden) per place, in the model's dtype    written inside the compiled forward pass
    sum_s += sum of the rows of span s                                    after it, per request: float32 within a step, float64 across steps

A request's tokens come in steps (chunked prefill), and come again after a preemption; each is taken once, by its position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from steer.backends.vllm.capture import COUNT, KEY, ROUTER, ROW, SEEN, SUM, Place, Ranges, Wanted, name_of

AT_ONCE = 1 << 26
"""Numbers that are widened to float32 at once: 256 MB."""


@dataclass(frozen=True, eq=False)
class Step:
    """What layers and routers wrote for some tokens of a step.

    Attributes:
        rows: of every place (token, hidden).
        ids, weights: of every router (token, chosen).
    """

    rows: Sequence[Float[Tensor, "token hidden"]]
    ids: Sequence[Int[Tensor, "token chosen"]]
    weights: Sequence[Float[Tensor, "token chosen"]]

    def part(self, start: int, stop: int) -> Step:
        """Return the tokens from `start` to `stop`."""
        cut = [[each[start:stop] for each in several] for several in (self.rows, self.ids, self.weights)]
        return Step(*cut)


@dataclass(eq=False)
class Sums:
    """What is kept of one request so far.

    Attributes:
        wanted: what is to be kept.
        seen: the tokens at positions below were taken.
        sums: of rows, (place, span, hidden); None before the first.
        counts: of choices of experts, (router, span, 2 x experts).
        rows: of each step, (place, token, hidden).
    """

    wanted: Wanted
    seen: int = 0
    sums: Float64[Tensor, "place span hidden"] | None = None
    counts: Float64[Tensor, "router counted experts_twice"] | None = None
    rows: list[Tensor] = field(default_factory=list)

    def take(self, first: int, count: int, step: Step, experts: int) -> None:
        """Take `count` tokens, the first of which is at position `first`.

        Those that were taken before are left out; where tokens between are missing nothing is taken, so that the end
        (`capture.joined`) finds too few.
        """
        known = self.seen - first
        if not 0 <= known < count:
            return
        step, first, count = step.part(known, count), first + known, count - known
        if self.wanted.means and step.rows:
            within = inside(self.wanted.means, first, count, step.rows[0].device)
            self.sums = _plus(self.sums, span_sums(step.rows, within))
        if self.wanted.counts and step.ids:
            within = inside(self.wanted.counts, first, count, step.ids[0].device)
            self.counts = _plus(self.counts, span_counts(step.ids, step.weights, within, experts))
        if self.wanted.rows and step.rows:
            self.rows.append(torch.stack([each.cpu() for each in step.rows]))
        self.seen += count


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    wide = more.double().cpu()
    return wide if total is None else total + wide


def inside(
    spans: Sequence[Ranges], first: int, count: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "span token"]:
    """Return 1 where a token lies in a span, for `count` tokens from position `first` on."""
    table = torch.zeros(len(spans), count)
    for row, ranges in enumerate(spans):
        for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
            table[row, max(start - first, 0) : max(stop - first, 0)] = 1.0
    return table.to(device)


def span_sums(
    rows: Sequence[Float[Tensor, "token hidden"]], within: Float[Tensor, "span token"]
) -> Float[Tensor, "place span hidden"]:
    """Return the sum of the rows over each span, in float32; a few places at once, so that little memory is needed."""
    at_once = max(1, AT_ONCE // rows[0].numel())
    groups = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    return torch.cat([torch.matmul(within, torch.stack([each.float() for each in group])) for group in groups])


def span_counts(
    ids: Sequence[Int[Tensor, "token chosen"]],
    weights: Sequence[Float[Tensor, "token chosen"]],
    within: Float[Tensor, "span token"],
    experts: int,
) -> Float[Tensor, "router span experts_twice"]:
    """Return how often each expert was chosen in each span, then with what weight in sum."""
    found = []
    for chosen, weight in zip(ids, weights, strict=True):
        row = torch.zeros(chosen.shape[0], 2 * experts, device=chosen.device)
        row.scatter_(1, chosen.long(), 1.0).scatter_(1, chosen.long() + experts, weight.float())
        found.append(within @ row)
    return torch.stack(found)


class Captured:
    """The buffers of one worker, and what it keeps of every request that is read.

    Args:
        places: that this worker's layers write; `router` stands for choices of experts.
        tokens: most tokens of a step, with the padding of graphs.
        hidden, experts, chosen: numbers of the model.
        dtype: of the model's activations.
        device: of the worker.

    Attributes:
        rows: place -> what a layer writes a site into.
        routers: layer -> what a router writes ids and weights into.
    """

    def __init__(
        self,
        places: Iterable[Place],
        *,
        tokens: int,
        hidden: int,
        experts: int,
        chosen: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.experts = experts
        self.rows: dict[Place, Tensor] = {}
        self.routers: dict[int, tuple[Tensor, Tensor]] = {}
        for site, layer in sorted(set(places)):
            if site == ROUTER:
                ids = torch.zeros(tokens, chosen, dtype=torch.int32, device=device)
                self.routers[layer] = ids, torch.zeros(tokens, chosen, device=device)
            else:
                self.rows[site, layer] = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        self._wanted: dict[str, Wanted] = {}
        self._sums: dict[str, Sums] = {}

    @property
    def memory(self) -> int:
        """Bytes of all buffers."""
        tensors = [*self.rows.values(), *(tensor for pair in self.routers.values() for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        """Take a request in, new or resumed; one that is not read is not kept."""
        plain = (extra_args or {}).get(KEY)
        if plain is not None:
            self._wanted[request_id] = Wanted.from_dict(plain)

    def remove(self, request_id: str) -> None:
        """Forget that a request runs; what was kept of it stays until it is taken."""
        self._wanted.pop(request_id, None)

    def ran(self, request_id: str, start: int, count: int, position: int) -> None:
        """Draw sums from a request's tokens in the step that was just run: `count` of them, from row `start` on."""
        wanted = self._wanted.get(request_id)
        if wanted is None:
            return
        ids, weights = [pair[0] for pair in self.routers.values()], [pair[1] for pair in self.routers.values()]
        step = Step(list(self.rows.values()), ids, weights).part(start, start + count)
        self._sums.setdefault(wanted.key, Sums(wanted)).take(position, count, step, self.experts)

    def take(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Hand over what was kept under these keys, as safetensors files in memory, and forget it."""
        return {key: self._file(self._sums.pop(key)) for key in keys if key in self._sums}

    def _file(self, kept: Sums) -> bytes:
        tensors = {SEEN: torch.tensor(kept.seen)}
        if kept.sums is not None:
            tensors |= {name_of(SUM, place): kept.sums[at] for at, place in enumerate(self.rows)}
        if kept.counts is not None:
            tensors |= {name_of(COUNT, (ROUTER, layer)): kept.counts[at] for at, layer in enumerate(self.routers)}
        if kept.rows:
            rows = torch.cat(kept.rows, dim=1)
            tensors |= {name_of(ROW, place): rows[at] for at, place in enumerate(self.rows)}
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
