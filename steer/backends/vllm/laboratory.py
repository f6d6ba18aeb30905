"""The laboratory of the proofs at start: vLLM's own forward on random streams, with what layers return taken down.

A few tokens run through the model of one process, uncompiled, with attention silenced, so that no token sees another; every
layer that is watched is given a fresh random stream. Runs differ in nothing but the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.backends.vllm.layers import part_of, signature
from steer.backends.vllm.routers import Rerouting
from steer.backends.vllm.tables import WIDTH, Tables
from steer.errors import SteerError

GROUPS = ("attn_out", "mlp_out", "resid_post", "resid_pre")
"""One token is written to at each of these, by the four gates of slot 1."""
PLAIN, SPLIT = 0, len(GROUPS) + 1
"""Two unsteered tokens with the same stream, divided differently between `hidden` and `residual`."""
TOKENS = len(GROUPS) + 2
REMEDY = "Steer another site (resid_post has the fewest conditions), or use the hook form"


@dataclass
class Seen:
    """What one forward showed of the layers that are watched."""

    given: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None


class Laboratory:
    """Runs the model of one process on random streams.

    Args:
        worker: vLLM's.
        model: of the worker.
        layers: those of this process.
        tables: of the worker, all zero; left as they are found.
        routers: those of the declared layers.
    """

    def __init__(self, worker: Any, model: nn.Module, layers: Mapping[int, nn.Module], tables: Tables, routers: Mapping[int, Rerouting]) -> None:  # fmt: skip
        self.runner, self.config, self.model = worker.model_runner, worker.vllm_config, model
        self.layers, self.tables, self.routers = layers, tables, routers
        declared = {layer for _, _, layer in tables.at}
        self.watched = sorted((declared | {layer + 1 for layer in declared}) & layers.keys())
        self.parts = {
            (site, number): part_of(layers[number], number, site, tables.declared)
            for at, _, number in tables.at
            for site in {"attn_out": ("attn_out", "mlp_out"), "resid_pre": ("attn_out", "mlp_out")}.get(at, (at,))
            if site in tables.declared.parts
        }

    def run(self) -> Seen:
        """Run the model with the tables as they are, and return what was seen."""
        seen = Seen()
        codes = [0, *range(WIDTH, 2 * WIDTH), 0]
        self.tables.tell(torch.tensor(codes, device=self.tables.device))
        skip = {"skip_attn": True} if hasattr(self.runner, "model_state") else {}
        with (
            torch.inference_mode(),
            uncompiled(self.model),
            self._watching(seen),
            silent(self.config, self.parts.values()),
        ):
            self.runner._dummy_run(TOKENS, is_profile=True, skip_eplb=True, **skip)
        self.tables.tell(torch.zeros(0, dtype=torch.int64, device=self.tables.device))
        missing = [number for number in self.watched if number not in seen.streams]
        if missing:
            raise SteerError(f"layer {missing[0]} of vLLM's model did not run in its forward", "every layer of the stage")  # fmt: skip
        return seen

    @contextmanager
    def _watching(self, seen: Seen) -> Iterator[None]:
        with ExitStack() as stack:
            for number in self.watched:
                layer = self.layers[number]
                stack.enter_context(
                    _removed(layer.register_forward_pre_hook(self._giver(seen, number), with_kwargs=True))
                )
                stack.enter_context(_removed(layer.register_forward_hook(self._keeper(seen, number))))
            for key, part in self.parts.items():
                stack.enter_context(_removed(part.register_forward_hook(_keep(seen.parts, key))))
            for number, router in self.routers.items():
                stack.enter_context(_removed(router.owner.register_forward_hook(_keep(seen.experts, number))))

            def last(module: nn.Module, args: Any, output: Any) -> None:
                final = output[0] if isinstance(output, tuple | list) else output
                seen.final = final.clone() if isinstance(final, Tensor) else None

            stack.enter_context(_removed(self.model.register_forward_hook(last)))
            yield

    def _giver(self, seen: Seen, number: int) -> Any:
        """Give a layer a fresh stream in place of its own."""
        layer = self.layers[number]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = signature(layer).bind(layer, *args, **kwargs)
            given = call.arguments
            hidden, residual = given.get("hidden_states"), given.get("residual")
            if not isinstance(hidden, Tensor) or hidden.squeeze(0).shape != (TOKENS, self.tables.declared.hidden):
                raise refusal(number, f"is called with {', '.join(given)}", "hidden_states, (token, hidden)")
            fresh = _random(number, 3, hidden)
            fresh[0][SPLIT] = fresh[0][PLAIN]
            given["hidden_states"] = fresh[0].view(hidden.shape)
            if isinstance(residual, Tensor):
                fresh[1][SPLIT] = fresh[1][PLAIN] - fresh[2][SPLIT]
                fresh[0][SPLIT] += fresh[2][SPLIT]
                given["residual"] = fresh[1]
            seen.given[number] = fresh[0].double() + (fresh[1].double() if isinstance(residual, Tensor) else 0)
            return call.args[1:], call.kwargs

        return hook

    def _keeper(self, seen: Seen, number: int) -> Any:
        """Note a layer's stream; of the last layer, hand it on divided differently for one token."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                seen.streams[number] = output.double().flatten(0, -2)
                return None
            hidden, residual, *rest = output
            seen.streams[number] = hidden.double() + residual.double()
            if number != self.tables.declared.layers - 1:
                return None
            moved = _random(number, 1, hidden)[0]
            moved[:SPLIT] = 0
            return (hidden + moved, residual - moved, *rest)

        return hook


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Keep vLLM from compiling a model that is only being looked at."""
    held = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    try:
        for module in held:
            object.__setattr__(module, "do_not_compile", True)
        yield
    finally:
        for module in held:
            object.__setattr__(module, "do_not_compile", False)


@contextmanager
def silent(config: Any, but: Iterable[nn.Module]) -> Iterator[None]:
    """Let attention return zeros, however it is called: without a cache its kernels return what lay in memory."""
    parts = {id(module) for module in but}
    known = config.compilation_config.static_forward_context.values()
    inner = [module for module in known if id(module) not in parts and not hasattr(module, "router")]
    try:
        for module in inner:
            object.__setattr__(module, "forward", _zeros(module.forward))
        yield
    finally:
        for module in inner:
            object.__delattr__(module, "forward")


def _zeros(original: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return torch.zeros_like(output) if isinstance(output, Tensor) else output

    return forward


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _keep(found: dict[Any, Tensor], key: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        found[key] = torch.stack([part.double() for part in parts if isinstance(part, Tensor)]).sum(0).flatten(0, -2)

    return hook


def _random(seed: int, count: int, like: Tensor) -> Tensor:
    """Tensors of eighths up to 4, whose sums every dtype holds: the same in every process."""
    found = torch.randn(count, TOKENS, like.shape[-1], generator=torch.Generator().manual_seed(seed))
    return (found.mul(8).round() / 8).clamp(-4, 4).to(like.device, like.dtype)


def refusal(number: int, found: str, expected: str) -> SteerError:
    """Return why a layer cannot be steered."""
    return SteerError(f"layer {number} of vLLM's model {found}", expected, REMEDY)
