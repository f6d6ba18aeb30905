"""Layers that write what is read into buffers, inside the forward pass, after every change.

| site | what is written |
|---|---|
| `resid_pre` | the stream that the layer is given, after a change of it |
| `attn_out`, `mlp_out` | what the block (or the norm behind it) returns, times the family's multiplier |
| `resid_mid` | the stream that the layer is given, and `attn_out` added to it |
| `resid_post` | the stream after the layer |
| `router` | ids and weights of the chosen experts, as the blocks use them |

vLLM keeps the stream as (hidden, residual), whose sum it is. Modules get another class, as in `layers`, and the two sides
of a change are told apart by the order of the classes: `before` is installed first, so that a changed layer calls it with
what it has changed; `after` last, so that it sees what a changed layer returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steer.backends.vllm.capture import ROUTER
from steer.backends.vllm.capture_worker import Captured
from steer.backends.vllm.config import Declared
from steer.backends.vllm.layers import part_of, signature
from steer.errors import SteerError


class _Given(nn.Module):
    """A decoder layer that writes the stream that it is given; `steer_stream_at` says where that stands in the call."""

    steer_stream_at: tuple[int, int]
    steer_pre: tuple[Tensor, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Any
        residual: Any
        hidden, residual = (
            kwargs[name] if name in kwargs else args[at] if at < len(args) else None
            for name, at in zip(("hidden_states", "residual"), self.steer_stream_at, strict=True)
        )
        for buffer in self.steer_pre:
            _write(buffer, hidden if residual is None else hidden + residual)
        return super().forward(*args, **kwargs)


class _Returned(nn.Module):
    """A decoder layer that writes the stream that it returns."""

    steer_post: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        _write(self.steer_post, output if isinstance(output, Tensor) else output[0] + output[1])
        return output


class _Contributed(nn.Module):
    """What writes `attn_out` or `mlp_out`: it is written, and added to the stream that came before it."""

    steer_scale: float
    steer_out: Tensor | None
    steer_mid: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        value = output[0] if isinstance(output, tuple) else output  # Transformers' attention, without its weights.
        value = value if self.steer_scale == 1.0 else value * self.steer_scale
        if self.steer_out is not None:
            _write(self.steer_out, value)
        if self.steer_mid is not None:
            self.steer_mid[: value.shape[-2]].add_(value.flatten(0, -2))
        return output


def _write(buffer: Tensor, value: Tensor) -> None:
    """Write a step's rows; layers that Transformers makes have an axis of one batch before them."""
    buffer[: value.shape[-2]].copy_(value.flatten(0, -2))


def before(layers: Mapping[int, nn.Module], captured: Captured) -> None:
    """Let layers write what they are given; before `layers.install`.

    Raises:
        SteerError: nobody knows where a layer is given the stream.
    """
    for number, layer in layers.items():
        buffers = tuple(
            captured.rows[site, number] for site in ("resid_pre", "resid_mid") if (site, number) in captured.rows
        )
        if buffers:
            names = list(signature(layer).parameters)[1:]
            given = names.index("hidden_states"), names.index("residual") if "residual" in names else len(names)
            _become(layer, _Given, steer_stream_at=given, steer_pre=buffers)


def after(layers: Mapping[int, nn.Module], captured: Captured, declared: Declared) -> None:
    """Let layers and their blocks write what they return; after `layers.install` and the routers' own changes.

    Raises:
        SteerError: a layer has no such block or router.
    """
    for number, layer in layers.items():
        post, mid = captured.rows.get(("resid_post", number)), captured.rows.get(("resid_mid", number))
        for site in ("attn_out", "mlp_out"):
            out, into = captured.rows.get((site, number)), mid if site == "attn_out" else None
            if out is not None or into is not None:
                part = part_of(layer, number, site, declared)
                _become(part, _Contributed, steer_scale=declared.parts[site][1], steer_out=out, steer_mid=into)
        if post is not None:
            _become(layer, _Returned, steer_post=post)
        if number in captured.routers:
            _listen(layer, number, *captured.routers[number])


def _listen(layer: nn.Module, number: int, ids: Tensor, weights: Tensor) -> None:
    routers = [module.router for module in layer.modules() if hasattr(getattr(module, "router", None), "_compute_routing")]  # fmt: skip
    if len(routers) != 1:
        raise SteerError(
            f"layer {number} of vLLM's model, a {type(layer).__name__}, has {len(routers)} routers",
            "one whose choice can be read",
            f"Leave {ROUTER} out, or use the HF back end",
        )
    router: Any = routers[0]
    original = router._compute_routing

    def compute_routing(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weight, chosen = original(*args, **kwargs)
        _write(ids, chosen)
        _write(weights, weight)
        return weight, chosen

    router._compute_routing = compute_routing


_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type, **held: object) -> None:
    own = type(module)
    if (mixin, own) not in _CLASSES:
        _CLASSES[mixin, own] = type(f"Read{own.__name__}", (mixin, own), {})
    module.__class__ = _CLASSES[mixin, own]
    for name, value in held.items():
        object.__setattr__(module, name, value)
