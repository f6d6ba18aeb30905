"""A TransformerLens bridge as a model that probes read: `collect(adopt(bridge), traces)`.

For people who have a bridge already, and as an oracle for our own reading. Only reading goes through it: the sites of
`transformer_lens.HOOKS`, by the bridge's own hooks, and the state behind its final norm. Steering, patches and generation
are refused; they belong to `steer.load`. Our names and numbers are proven equal to the bridge's, and refused where its
are others: DeepSeek V3's `z`, which the bridge splits by another width, and linear attention, which has no `z`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from steer.anatomy.modules import Places
from steer.backends.transformer_lens import HOOKS, hook_name
from steer.errors import SteerError
from steer.hooks import Reader, Wanted
from steer.model import SteerableModel, wrap
from steer.routing import Listener, Routing, chosen

FINAL = "unembed.hook_in"
SPLIT_OTHERWISE = ("deepseek_v3", "gemma4_text")


class LensModel(SteerableModel):
    """A model whose passes run through a bridge; of `hf` only the configuration and the parts' names are used."""

    bridge: Any

    @property
    def places(self) -> Places:
        """The bridge's own parts where a recorder or a probe uses one: layers, output projections, head."""
        twin, path = super().places, self.anatomy.record.layer.attention_output
        layers = []
        for number, (place, block) in enumerate(zip(twin.layers, self.bridge.blocks, strict=True)):
            linear = number in self.anatomy.linear_layers
            output = place.attention_output if linear else block.get_submodule(path).original_component
            layers.append(replace(place, layer=block, attention_output=output))
        return replace(twin, layers=tuple(layers), head=self.bridge.unembed.original_component)

    @property
    def device(self) -> torch.device:
        """Of the bridge's parameters."""
        found: torch.device = next(self.bridge.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the bridge's parameters."""
        found: torch.dtype = next(self.bridge.parameters()).dtype
        return found

    def _refused(self) -> NoReturn:
        raise SteerError(
            "a TransformerLens bridge is read here, not changed",
            "collect and probes",
            "Load the model with steer.load to steer it",
        )

    def steered(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see the module."""
        self._refused()

    def with_(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see the module."""
        self._refused()

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see the module."""
        self._refused()

    @contextmanager
    def read(self, callback: Reader, wanted: Wanted) -> Iterator[None]:
        """Call `callback(site, layer, value, None)` in the bridge's pass, as `SteerableModel.read`.

        Raises:
            SteerError: a site that the bridge has not, or has otherwise.
        """
        with ExitStack() as stack:
            hooks = []
            for site, layers in wanted.items():
                for layer in range(self.anatomy.layers) if layers is None else layers:
                    self._check(site, layer)
                    hooks.append((hook_name(site, layer), _observing(callback, site, layer)))
            stack.enter_context(self.bridge.hooks(fwd_hooks=hooks))
            yield

    @contextmanager
    def hear(self, listener: Listener, layers: Sequence[int] | None = None) -> Iterator[None]:
        """Call `listener(layer, routing, None)` in the bridge's pass, as `SteerableModel.hear`."""
        experts = self.anatomy.record.experts
        with ExitStack() as stack:
            for layer in self.anatomy.expert_layers if layers is None else layers:
                self.taps.check_place("router", layer)
                assert experts is not None, "check_place refuses models without experts"
                router = self.bridge.blocks[layer].get_submodule(experts.router)
                shape: list[tuple[int, int]] = []
                stack.enter_context(self.read(_shaped(shape), {"resid_pre": [layer]}))
                handle = router.register_forward_hook(_hearing(listener, layer, shape))
                stack.callback(handle.remove)
            yield

    def _check(self, site: str, layer: int) -> None:
        split = site == "z" and self.anatomy.family in SPLIT_OTHERWISE
        if split or (site in ("z", "attn_out") and layer in self.anatomy.linear_layers):
            raise SteerError(
                f"TransformerLens has {site} of {self.anatomy.family}'s layer {layer} in another shape, or not at all",
                f"one of {', '.join(name for name in HOOKS if name != site)}",
                "Read it with steer.load",
            )

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None = None,
        marks_from: Sequence[int] | None = None,
        *,
        head: bool = True,
    ) -> list[Float[Tensor, "token width"]]:
        """Run whole sequences through the bridge, padded on the right; as `SteerableModel.run`.

        The bridge always computes its head; `head=False` returns what went into it.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise SteerError("there is nothing to run, or a sequence is empty", "at least one token per sequence")
        longest = max(map(len, sequences))
        ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
        kept: list[Tensor] = []
        with self.bridge.hooks(fwd_hooks=[] if head else [(FINAL, lambda value, hook: kept.append(value))]):
            logits = self.bridge(ids.to(self.device))
        values = logits if head else kept[0]
        precise = torch.promote_types(values.dtype, torch.float32)
        return [values[row, : len(sequence)].to(precise) for row, sequence in enumerate(sequences)]


def adopt(bridge: Any, tokenizer: Any = None, *, name: str = "") -> LensModel:
    """Return a bridge as a model that `probes.collect` reads; the bridge stays as it is.

    Args:
        bridge: a `TransformerBridge` around a model of `transformers`.
        tokenizer: None takes the bridge's own.
        name: for the reader.

    Raises:
        SteerError: not such a bridge, or a family without a record.
    """
    config = getattr(getattr(bridge, "original_model", None), "config", None)
    if config is None or not hasattr(bridge, "hooks"):
        raise SteerError(
            f"a {type(bridge).__name__} was given",
            "a TransformerBridge around a Hugging Face model",
            "TransformerBridge.boot_transformers(NAME), or steer.backends.transformer_lens.wrap(hf_model).bridge",
        )
    from transformers import AutoModelForCausalLM as Imported

    maker: Any = Imported

    with torch.device("meta"):  # Names and shapes without weights: the bridge has renamed its own.
        twin = maker.from_config(config)
    tokenizer = tokenizer if tokenizer is not None else getattr(bridge, "tokenizer", None)
    parts = wrap(twin, tokenizer, name=name or getattr(config, "name_or_path", ""), self_check=False)
    model = LensModel(parts.hf, parts.tokenizer, parts.taps, parts.identity, parts.marks)
    model.bridge = bridge
    return model


def _shaped(shape: list[tuple[int, int]]) -> Reader:
    def observe(site: str, layer: int, value: Tensor, states: Tensor | None) -> None:
        shape[:] = [(value.shape[0], value.shape[1])]

    return observe


def _hearing(listener: Listener, layer: int, shape: list[tuple[int, int]]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        _, weights, ids = (part.reshape(*shape[0], -1) for part in chosen(output, f"layer {layer}"))
        listener(layer, Routing(ids, weights), None)

    return hook


def _observing(callback: Reader, site: str, layer: int) -> Any:
    def observe(value: Tensor, hook: Any) -> None:
        callback(site, layer, value, None)

    return observe
