"""Layers that look their change up: the declared layers of vLLM's own model, with another class.

vLLM's decoder layers return (hidden, residual), whose sum is the stream, or the stream alone; those of Transformers, which
vLLM runs where it has none of its own, have an axis of one batch before the tokens. What is added at
`resid_post` goes to the residual; `attn_out` and `mlp_out` are changed where the block (or the norm behind it) returns.
A changed class keeps the parameters' names, and is there before anything is traced or captured.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import Place
from steer.backends.vllm.tables import Tables, change
from steer.errors import SteerError

LAYER = re.compile(r"(^|.*\.)layers\.(\d+)$")
ELSEWHERE = {"self_attn": "attn", "mlp": "block_sparse_moe"}
"""Other names that vLLM has for parts of layers; the self-check proves whatever is found there."""


class _Steered(nn.Module):
    """What the changed classes share: their tables as plain attributes, as tracing wants them."""

    steer_code: Tensor
    steer_slot: Tensor
    steer_tables: dict[str, Any]

    def steer_change(self, value: Tensor, site: str) -> Tensor:
        count, tables = value.shape[-2], self.steer_tables
        code, slot = self.steer_code[:count], self.steer_slot[:count]
        return change(value, tables.get(f"{site}.project"), tables.get(f"{site}.add"), code, slot)


class _SteeredLayer(_Steered):
    """A decoder layer: changes of `resid_pre` (layer 0) and `resid_post`; `steer_given` is where it is given the stream."""

    steer_given: int
    steer_before: bool
    steer_after: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.steer_before:
            args, kwargs = _with_stream(self, args, kwargs)
        output = super().forward(*args, **kwargs)
        if not self.steer_after:
            return output
        if isinstance(output, Tensor):
            return (output.float() + self.steer_change(output, "resid_post")).to(output.dtype)
        hidden, residual, *rest = output
        needs_stream = "resid_post.project" in self.steer_tables
        stream = hidden.float() + residual.float() if needs_stream else residual
        added = self.steer_change(stream, "resid_post")
        return (hidden, (residual.float() + added).to(residual.dtype), *rest)


class _SteeredPart(_Steered):
    """What writes `attn_out` or `mlp_out`."""

    steer_site: str
    steer_multiplier: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple) and output and all(rest is None for rest in output[1:]):
            return (self._changed(output[0]), *output[1:])  # Transformers' attention, without its weights.
        return self._changed(output)

    def _changed(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise SteerError(
                f"the module that writes {self.steer_site} returns {type(output).__name__}",
                "one tensor",
                "Steer resid_post, or use the hook form",
            )
        value = output.float() * self.steer_multiplier
        added = self.steer_change(value, self.steer_site) / self.steer_multiplier
        return (output.float() + added).to(output.dtype)


def _with_stream(layer: _SteeredLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Change `hidden_states` of the first layer, where it is the whole stream."""
    given = "hidden_states" in kwargs
    hidden = kwargs["hidden_states"] if given else args[layer.steer_given]
    changed = (hidden.float() + layer.steer_change(hidden, "resid_pre")).to(hidden.dtype)
    if given:
        return args, {**kwargs, "hidden_states": changed}
    return (*args[: layer.steer_given], changed, *args[layer.steer_given + 1 :]), kwargs


def signature(layer: nn.Module) -> inspect.Signature:
    """Return how vLLM calls a layer, `self` included, whatever classes were put before its own.

    Raises:
        SteerError: `hidden_states` is not among the names.
    """
    own: Any = next(
        cls for cls in type(layer).__mro__ if "forward" in vars(cls) and not cls.__module__.startswith("steer.")
    )
    found = inspect.signature(own.forward)
    if "hidden_states" not in found.parameters:
        raise SteerError(
            f"vLLM's {own.__name__} is called with {', '.join(found.parameters)}",
            "hidden_states among them",
            "Use the hook form",
        )
    return found


def decoder_layers(model: nn.Module, declared: Declared) -> dict[int, nn.Module]:
    """Return the decoder layers that this process has, by number.

    Raises:
        SteerError: there is no list of that many layers, or more than one.
    """
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        match = LAYER.match(name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = module
    lists = {start: layers for start, layers in found.items() if len(layers) == declared.layers}
    if len(lists) != 1:
        counted = ", ".join(f"{start}layers ({len(layers)})" for start, layers in found.items()) or "none"
        raise SteerError(
            f"the model that vLLM made has the layers {counted}",
            f"one list of {declared.layers}, as the checkpoint has",
        )
    (layers,) = lists.values()
    return {number: layer for number, layer in layers.items() if type(layer).__name__ != "PPMissingLayer"}


def local_places(declared: Declared, layers: Mapping[int, nn.Module]) -> list[Place]:
    """Return the declared places of the layers that this process has."""
    return [place for place in declared.places if place[2] in layers]


def part_of(layer: nn.Module, number: int, site: str, declared: Declared) -> nn.Module:
    """Return the module of a layer that writes `attn_out` or `mlp_out`.

    Raises:
        SteerError: vLLM's layer has none of the names.
    """
    own, _ = declared.parts[site]
    paths = (*own, *(ELSEWHERE[path] for path in own if path in ELSEWHERE))
    for path in paths:
        module: Any = layer
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return module
    raise SteerError(
        f"layer {number} of vLLM's model, a {type(layer).__name__}, has no {' or '.join(paths)}",
        f"the module that writes {site}",
        "Steer resid_post, or use the hook form",
    )


def install(layers: Mapping[int, nn.Module], tables: Tables) -> None:
    """Give every declared layer, and the modules in it, the class that looks its change up.

    Raises:
        SteerError: a layer has no such module.
    """
    declared = tables.declared
    for site in ("attn_out", "mlp_out"):
        for number in sorted({layer for at, kind, layer in tables.at if at == site}):
            part = part_of(layers[number], number, site, declared)
            _become(part, _SteeredPart, tables, (site,), number)
            part.steer_site, part.steer_multiplier = site, declared.parts[site][1]  # type: ignore[assignment]
    for number in sorted({layer for at, _, layer in tables.at if at in ("resid_pre", "resid_post")}):
        layer = layers[number]
        _become(layer, _SteeredLayer, tables, ("resid_pre", "resid_post"), number)
        held = layer.steer_tables
        layer.steer_given = list(signature(layer).parameters).index("hidden_states") - 1  # type: ignore[assignment]
        layer.steer_before = any(name.startswith("resid_pre") for name in held)  # type: ignore[assignment, union-attr]
        layer.steer_after = any(name.startswith("resid_post") for name in held)  # type: ignore[assignment, union-attr]


_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type, tables: Tables, sites: tuple[str, ...], number: int) -> None:
    own = type(module)
    if "forward" in vars(module):
        raise SteerError(
            f"a {own.__name__} of layer {number} has a forward of its own, past its class",
            "a module as its class made it",
            "Leave offloading of weights out (--cpu-offload-gb, --offload-group-size)",
        )
    if (mixin, own) not in _CLASSES:
        _CLASSES[mixin, own] = type(f"Steered{own.__name__}", (mixin, own), {})
    held = {
        f"{site}.{kind}": table for (site, kind, layer), table in tables.at.items() if layer == number and site in sites
    }
    module.__class__ = _CLASSES[mixin, own]
    for name, value in (("steer_code", tables.code), ("steer_slot", tables.slot), ("steer_tables", held)):
        object.__setattr__(module, name, value)
