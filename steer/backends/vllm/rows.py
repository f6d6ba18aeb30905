"""Rows of a step: which request is where, and what every token's slot and state is.

A runner says before each forward which requests it runs, from which absolute position on, and where their tokens lie.
Positions decide what is prompt; marks decide the rest, on the device, and only where a steering needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from steer.backends.vllm.capture_worker import Captured
from steer.backends.vllm.library import Library
from steer.backends.vllm.lowering import Lowered
from steer.backends.vllm.request import KEY, Request
from steer.backends.vllm.tables import WIDTH, Tables, moved
from steer.backends.vllm.tracker import Tracker
from steer.errors import SteerError
from steer.phases import State

Known = Callable[[], Sequence[int]]
"""The tokens of a request that the host knows: the prompt, and what was written before it was resumed."""


@dataclass(frozen=True)
class Span:
    """The tokens of one request in a step.

    Attributes:
        request_id: vLLM's.
        start, count: where they lie among the step's tokens.
        position: absolute position of the first.
    """

    request_id: str
    start: int
    count: int
    position: int


@dataclass
class _Live:
    request: Request
    lowered: Lowered
    known: Known
    row: int = -1
    position: int = -1
    """Where the next token is expected; another one means that the request was resumed or jumped."""


class Rows:
    """Follows the requests of one worker.

    Args:
        library: what requests do.
        tables: where it is written.
        requests: how many may run at once.
        captured: where rows are kept that are read; None: none are.
    """

    def __init__(self, library: Library, tables: Tables, requests: int, captured: Captured | None = None) -> None:
        self.library, self.tables, self.captured = library, tables, captured
        self.tracker = Tracker(library.declared.marks, requests, tables.device)
        self._live: dict[str, _Live] = {}
        self._free_rows = list(range(requests))
        self._quiet = True

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None, known: Known) -> None:
        """Take a request in, new or resumed; one without steering is not kept.

        Raises:
            SteerError: what it asks for cannot be run. The engine core has checked the same before.
        """
        self.remove(request_id)
        plain = (extra_args or {}).get(KEY)
        if plain is not None:
            request = Request.from_dict(plain)
            self._live[request_id] = _Live(request, self.library.lowered(request), known)
        if self.captured is not None:
            self.captured.add(request_id, extra_args)

    def remove(self, request_id: str) -> None:
        """Forget a request that has finished or was preempted."""
        live = self._live.pop(request_id, None)
        if live is not None and live.row >= 0:
            self._free_rows.append(live.row)
        if self.captured is not None:
            self.captured.remove(request_id)

    def step(self, spans: Sequence[Span], token_ids: Int[Tensor, " token"] | None) -> None:
        """Write slot and state of every token of the step to the device, before the forward.

        Args:
            spans: of the requests that run, in any order.
            token_ids: of the step, on the device.

        Raises:
            SteerError: the step has more tokens than tables, or marks are needed and the tokens are not known.
        """
        steered = [(span, self._live[span.request_id]) for span in spans if span.request_id in self._live]
        if not steered:
            if not self._quiet:
                self.tables.tell(torch.zeros(0, dtype=torch.int64))
                self._quiet = True
            return
        self._quiet = False
        length = max(span.start + span.count for span, _ in steered)
        if length > self.tables.tokens:
            raise SteerError(f"a step has {length} tokens", f"at most {self.tables.tokens}, the rows of the tables")
        slots = self.tables.slots_of({live.request.fingerprint: live.lowered for _, live in steered})
        code = np.zeros(length, dtype=np.int64)
        for span, live in steered:
            self._positional(code, span, live, slots[live.request.fingerprint])
        device = moved(torch.from_numpy(code), self.tables.device)
        marked = [(span, live) for span, live in steered if live.lowered.marked]
        if marked:
            device = self._marked(device, marked, token_ids)
        self.tables.tell(device)

    def ran(self, spans: Sequence[Span]) -> None:
        """Draw what is read of the step that was just run, after its forward."""
        if self.captured is not None:
            for span in spans:
                self.captured.ran(span.request_id, span.start, span.count, span.position)

    def _positional(self, code: Int[np.ndarray, " token"], span: Span, live: _Live, slot: int) -> None:
        begin = slot * WIDTH
        code[span.start : span.start + span.count] = begin + State.OPENING
        prompt = min(max(live.request.prompt_length - 1 - span.position, 0), span.count)
        code[span.start : span.start + prompt] = begin + State.PROMPT

    def _marked(self, code: Tensor, marked: Sequence[tuple[Span, _Live]], token_ids: Tensor | None) -> Tensor:
        if token_ids is None:
            raise SteerError("a phase between marks needs the step's tokens, and the runner has none", "token ids")
        for span, live in marked:
            if live.row < 0 or live.position != span.position:
                self._enter(span, live)
            live.position = span.position + span.count
        index, states = self.tracker.read(
            [live.row for _, live in marked],
            [span.start for span, _ in marked],
            [span.count for span, _ in marked],
            token_ids,
        )
        own = torch.div(code[index], WIDTH, rounding_mode="floor") * WIDTH
        return code.index_put((index,), own + states.clamp(min=0))

    def _enter(self, span: Span, live: _Live) -> None:
        if live.row < 0:
            self._free_rows = self._free_rows or list(self.tracker.grow())
            live.row = self._free_rows.pop()
        read = list(live.known())[: span.position]
        if len(read) < span.position or min(read, default=0) < 0:
            raise SteerError(
                f"request {span.request_id} goes on at token {span.position}, and the host knows {len(read)}",
                "all tokens before it",
            )
        self.tracker.enter(live.row, live.request.prompt_length, live.request.marks_from, read)
