"""The proof at start: what is written at a declared place arrives in the stream, once and unscaled, and nowhere else.

The same tokens run twice through the `laboratory`, with tables of zeros and with random rows, and each token is written to
at one kind of site. With the model's multipliers m and D for "after minus before":

    D(m attn_out), D(m mlp_out), D(resid_post)  ==  what the tables say        where that site is written
    D(resid_post)  ==  D(m attn_out) + D(m mlp_out)                             where attn_out or mlp_out is
    a layer given (hidden + d, residual - d)  ==  given (hidden, residual)      the stream is the sum of what layers return
    everything  ==  before                                                      where nothing is written

and with several processes per layer, that all have the same stream: a block whose parts are added up later fails there.
So a family that scales, norms, splits or forgets what a block returns is refused, and the engine does not start.
`steer.backends.vllm.router_check` proves the routers by further runs of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.anatomy.selfcheck import TOLERANCES
from steer.backends.vllm.laboratory import GROUPS, PLAIN, SPLIT, TOKENS, Laboratory, Seen, refusal
from steer.backends.vllm.router_check import prove_routers
from steer.backends.vllm.routers import Rerouting
from steer.backends.vllm.tables import WIDTH, Table, Tables
from steer.errors import SteerError


def prove(worker: Any, model: nn.Module, layers: Mapping[int, nn.Module], tables: Tables, routers: Mapping[int, Rerouting]) -> None:  # fmt: skip
    """Prove the installed layers and routers.

    Args:
        worker: vLLM's, its model loaded, nothing compiled yet.
        model: of the worker.
        layers: those of this process, by number.
        tables: all zero; they are zero again afterwards.
        routers: of `routers.install`.

    Raises:
        SteerError: a write does not arrive as it should: which layer and site, and what was found.
    """
    if not tables.at:
        return
    if tables.tokens < TOKENS:
        raise SteerError(f"a step has at most {tables.tokens} tokens", f"at least {TOKENS}, which the proof at start takes", "Raise --max-num-batched-tokens")  # fmt: skip
    laboratory = Laboratory(worker, model, layers, tables, routers)
    plain = laboratory.run()
    with filled(tables):
        written = laboratory.run()
    tolerance = TOLERANCES.get(worker.vllm_config.model_config.dtype, TOLERANCES[torch.bfloat16])
    for number in laboratory.watched:
        _check_split(plain.streams[number], number, tolerance)
    for site, _, number in tables.at:
        if site in GROUPS:
            _Place(site, number, tables, plain, written, tolerance).check()
    _check_last(laboratory, plain, written, tolerance)
    _check_ranks(worker.vllm_config, written, tolerance)
    prove_routers(laboratory, plain, tolerance)


@contextmanager
def filled(tables: Tables) -> Iterator[None]:
    """Fill slot 1 of every place but the routers': random rows, each open in its own group's state."""
    rows: list[Table] = []
    for (site, kind, number), table in tables.at.items():
        if site not in GROUPS:
            continue
        row = torch.randn(tables.declared.hidden, generator=torch.Generator().manual_seed(7 * number + len(kind)))
        table["vector"][1].copy_(row / row.norm() if kind == "project" else row)
        table["gate"][WIDTH + GROUPS.index(site)] = 1.0
        rows.append(table)
    try:
        yield
    finally:
        for table in rows:
            table["vector"][1].zero_()
            table["gate"].zero_()


@dataclass(frozen=True)
class _Place:
    """A declared place, with what was seen of it before and after writing."""

    site: str
    number: int
    tables: Tables
    plain: Seen
    written: Seen
    tolerance: float

    def check(self) -> None:
        token = 1 + GROUPS.index(self.site)
        before, after = (seen.streams[self.number] for seen in (self.plain, self.written))
        moved = after - before
        if self.site == "resid_post":
            self._same("the stream after it moves by", moved[token], self._expected(before[token]))
        elif self.site == "resid_pre":
            arrived = moved[token] - self._moved("attn_out", token) - self._moved("mlp_out", token)
            self._same(
                "the stream that it is given moves by", arrived, self._expected(self.plain.given[self.number][token])
            )
        else:
            own = self._moved(self.site, token)
            self._same("what its module returns moves by", own, self._expected(self._value(self.plain, self.site, token)))  # fmt: skip
            total = own + (self._moved("mlp_out", token) if self.site == "attn_out" else 0)
            self._same("the stream after it moves by", moved[token], total)
        self._same("a token that is not written to moves by", moved[PLAIN], moved[PLAIN] * 0)

    def _value(self, seen: Seen, site: str, token: int) -> Tensor:
        return seen.parts[site, self.number][token].double() * self.tables.declared.parts[site][1]

    def _moved(self, site: str, token: int) -> Tensor:
        return self._value(self.written, site, token) - self._value(self.plain, site, token)

    def _expected(self, value: Tensor) -> Tensor:
        """What the tables write, in float64, by the formulas of `steer.backends.vllm.lowering`."""
        found = torch.zeros_like(value)
        for kind in ("project", "add"):
            generator = torch.Generator().manual_seed(7 * self.number + len(kind))
            row = torch.randn(value.shape[-1], generator=generator).to(value.device)
            if (self.site, kind, self.number) in self.tables.at:
                unit = (row / row.norm()).double()
                found = found + (row.double() if kind == "add" else -(value @ unit) * unit)
        return found

    def _same(self, what: str, found: Tensor, expected: Tensor) -> None:
        size = max(float(self.plain.streams[self.number].abs().max()), float(expected.abs().max()))
        if not float((found - expected).abs().max()) <= self.tolerance * size:
            raise refusal(
                self.number,
                f"was written to at {self.site}, and {what} {float(found.norm()):.4g} ({float((found - expected).norm()):.4g} off)",
                f"{float(expected.norm()):.4g}, as it was written",
            )


def _check_split(stream: Tensor, number: int, tolerance: float) -> None:
    apart = float((stream[PLAIN] - stream[SPLIT]).abs().max())
    if not apart <= tolerance * float(stream.abs().max()):
        raise refusal(number, f"returns something else ({apart:.4g} off) where the same stream is divided differently between hidden_states and residual", "a layer that adds the two")  # fmt: skip


def _check_last(laboratory: Laboratory, plain: Seen, written: Seen, tolerance: float) -> None:
    """Prove that what follows the last layer takes the sum, and that a write there reaches the end."""
    last, before, after = laboratory.tables.declared.layers - 1, plain.final, written.final
    if last not in laboratory.watched:
        return
    if before is None or after is None or before.shape[0] != TOKENS:
        raise refusal(last, "is not followed by an output of the model", "one row per token")
    size, final = tolerance * float(before.abs().max()), before.double()
    if not float((final[PLAIN] - final[SPLIT]).abs().max()) <= size:
        raise refusal(last, "is followed by a norm that does not add hidden_states and residual", "one that does")
    token = 1 + GROUPS.index("resid_post")
    reached = float((after.double() - final)[token].abs().max()) > size
    if any((site, number) == ("resid_post", last) for site, _, number in laboratory.tables.at) and not reached:
        raise refusal(last, "was written to at resid_post, and the model's output stayed as it was", "another output")


def _check_ranks(config: Any, seen: Seen, tolerance: float) -> None:
    """Prove that all processes that share the layers have the same stream."""
    if config.parallel_config.tensor_parallel_size == 1:
        return
    from vllm.distributed.parallel_state import get_tp_group

    numbers = sorted(seen.streams)
    own = torch.stack([seen.streams[number].float() for number in numbers])
    everybody = get_tp_group().all_gather(own.unsqueeze(0), dim=0)
    apart = (everybody - own).abs().amax((0, 2, 3))
    for number, stream, far in zip(numbers, own, apart, strict=True):
        if not float(far) <= tolerance * float(stream.abs().max()):
            raise refusal(number, f"has another stream in each of the processes that share it (up to {float(far):.4g} apart)", "the same")  # fmt: skip
