"""The self-check: one short forward pass proves that a record describes its model (the identities of DESIGN §2).

For every layer, with m the multiplier and `norm` the module of the contribution:

    attn_raw  == W_O z + b
    attn_out  == contribution(attn_raw)          mlp_out == contribution(mlp_raw) where there is one dense MLP
    resid_mid == resid_pre + attn_out            resid_post == resid_mid + mlp_out, or s (resid_mid + mlp_out + extra)
                                                 where the record declares a scale s or extra writers at the layer's end
    resid_pre of the next layer == resid_post    resid_pre of layer 0 comes from the backbone's input

A wrong module, norm, multiplier or an extra writer breaks at least one of them. Differences are taken relative to the
largest value at hand; the tolerances leave room for the rounding of one addition or one projection in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steer.anatomy.modules import LayerPlaces, module_tree
from steer.anatomy.resolve import Contributes
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.model import SteerableModel

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TOKENS = 4
SITES = ("resid_pre", "z", "attn_raw", "attn_out", "resid_mid", "mlp_raw", "mlp_out", "resid_post")


@dataclass(frozen=True)
class SelfCheck:
    """What was proven.

    Attributes:
        tolerance: largest relative difference allowed, by the model's dtype.
        differences: identity -> largest relative difference over the layers.
        layers: how many layers were checked.
        tokens: length of the forward pass.
    """

    tolerance: float
    differences: dict[str, float]
    layers: int
    tokens: int


class _Checker:
    """Follows one forward pass layer by layer and keeps no more than one layer's values."""

    def __init__(self, model: SteerableModel) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}
        self.previous: Tensor | None = None
        self.worst: dict[str, tuple[float, int]] = {}
        self.layer_end = _LayerEnd(model)

    def __call__(self, site: str, layer: int, value: Tensor, states: Tensor | None) -> None:
        if not bool(torch.isfinite(value).all()):
            raise SteerError(
                f"{site} of layer {layer} of {self.model.name} is NaN or infinite on a short text of ordinary tokens",
                "finite activations",
                "The weights are damaged, or overflow in this dtype: download them again, or load with dtype=torch.float32",
            )
        anatomy = self.model.anatomy
        width = (anatomy.heads, anatomy.head_width) if site == "z" else (anatomy.hidden,)
        if value.shape[2:] != width:
            raise self._refusal(f"{site} has vectors of shape {tuple(value.shape[2:])} in layer {layer}, not {width}")
        self.seen[site] = value
        if site == "resid_post":
            for name, left, right in self._identities(layer):
                self._compare(name, layer, left, right)
            self.previous, self.seen = value, {}

    def _identities(self, layer: int) -> list[tuple[str, Tensor, Tensor]]:
        seen, place, anatomy = self.seen, self.model.places.layers[layer], self.model.anatomy
        missing = [site for site in SITES if site not in seen and layer in anatomy.site_layers(site)]
        if missing:
            raise self._refusal(f"{', '.join(missing)} of layer {layer} never appeared in a forward pass")
        attention, mlp = anatomy.attention_contribution, anatomy.mlp_contribution
        found = [
            (
                f"attn_out == {_named(attention, 'attn_raw')}",
                seen["attn_out"],
                _contributed(attention, place, True)(seen["attn_raw"]),
            ),
            (
                "resid_mid == resid_pre + attn_out",
                seen["resid_mid"],
                seen["resid_pre"] + seen["attn_out"].to(seen["resid_pre"].device),
            ),
            (
                self.layer_end.named,
                seen["resid_post"],
                self.layer_end(layer, seen["resid_mid"] + seen["mlp_out"].to(seen["resid_mid"].device)),
            ),
        ]
        if "z" in seen:
            projected = _projected(place.attention_output, seen["z"].flatten(-2))
            found.append(("attn_raw == W_O z + b", seen["attn_raw"], projected))
        if "mlp_raw" in seen:
            found.append(
                (
                    f"mlp_out == {_named(mlp, 'mlp_raw')}",
                    seen["mlp_out"],
                    _contributed(mlp, place, False)(seen["mlp_raw"]),
                )
            )
        if self.previous is not None:
            found.append(("resid_pre == resid_post of the layer before", seen["resid_pre"], self.previous))
        return found

    def _compare(self, name: str, layer: int, left: Tensor, right: Tensor) -> None:
        if left.shape != right.shape:
            raise self._refusal(f"layer {layer} breaks {name}: shapes {tuple(left.shape)} and {tuple(right.shape)}")
        left, right = left.detach().to("cpu", torch.float64), right.detach().to("cpu", torch.float64)
        scale = max(float(left.abs().max()), float(right.abs().max()), 1e-30)
        difference = float((left - right).abs().max()) / scale
        if not difference <= self.worst.get(name, (-1.0, 0))[0]:
            self.worst[name] = (difference, layer)

    def finish(self, tolerance: float) -> SelfCheck:
        broken = {name: found for name, found in self.worst.items() if not found[0] <= tolerance}
        if broken:
            words = "; ".join(
                f"{name} is off by {difference:.2g} in layer {layer}" for name, (difference, layer) in broken.items()
            )
            raise self._refusal(f"{words} (relative, allowed {tolerance:g})")
        differences = {name: difference for name, (difference, _) in self.worst.items()}
        return SelfCheck(tolerance, differences, self.model.anatomy.layers, TOKENS)

    def _refusal(self, what: str) -> SteerError:
        record = self.model.anatomy.record
        return SteerError(
            f"the anatomy record {record.family!r} does not describe {self.model.name}: {what}",
            f"every identity of docs/anatomy.md to hold; layer 0 is: {module_tree(self.model.places.layers[0].layer)}",
            "Correct `before_mlp`, the contributions or the module paths in a copy of the record and give it with anatomy=FILE",
        )


class _LayerEnd:
    """What a layer makes of resid_mid + mlp_out: nothing, or what the record declares under `layer_end`."""

    def __init__(self, model: SteerableModel) -> None:
        declared = model.anatomy.record.layer_end
        self.layers = [place.layer for place in model.places.layers]
        self.scale = declared.scale if declared else ""
        self.extra = declared.extra if declared else ()
        self.added: dict[int, list[Tensor]] = {}

    @property
    def named(self) -> str:
        """The identity in words."""
        total = " + ".join(["resid_mid", "mlp_out", *self.extra])
        return f"resid_post == {self.scale} x ({total})" if self.scale else f"resid_post == {total}"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what the extra modules return; a model without one of them adds nothing there."""
        handles = []
        for number, layer in enumerate(self.layers):
            kept = self.added.setdefault(number, [])
            for name, module in layer.named_modules():
                if name in self.extra:
                    handles.append(module.register_forward_hook(lambda *call, kept=kept: kept.append(call[2])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        for added in self.added.get(layer, ()):
            value = value + added.to(value.device)
        if not self.scale:
            return value
        owner, _, name = self.scale.rpartition(".")
        scale: Tensor = getattr(self.layers[layer].get_submodule(owner), name)
        return value * scale.to(value.device)


@torch.no_grad()
def self_check(model: SteerableModel) -> SelfCheck:
    """Prove the identities on every layer by one forward pass over four tokens.

    Raises:
        SteerError: an identity does not hold; it is named, with the layer and the module tree.
    """
    vocab = model.anatomy.vocab
    ids = torch.tensor([[vocab * (index + 1) // (TOKENS + 2) for index in range(TOKENS)]], device=model.device)
    checker = _Checker(model)
    training = model.hf.training
    model.hf.eval()
    try:
        with checker.layer_end.listening(), model.read(checker, dict.fromkeys(SITES)):
            model.backbone(input_ids=ids, use_cache=False)
    finally:
        model.hf.train(training)
    if "resid_pre == resid_post of the layer before" not in checker.worst and model.anatomy.layers > 1:
        raise checker._refusal("its layers do not run one after the other")
    return checker.finish(tolerance_of(model.dtype))


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains in this dtype."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def _named(contribution: Contributes, raw: str) -> str:
    return {"identity": raw, "scale": f"{contribution.multiplier:g} x {raw}", "norm": f"{contribution.norm}({raw})"}[
        contribution.kind
    ]


def _contributed(contribution: Contributes, place: LayerPlaces, attention: bool) -> Callable[[Tensor], Tensor]:
    if contribution.kind == "identity":
        return lambda raw: raw
    if contribution.kind == "scale":
        return lambda raw: raw * contribution.multiplier
    norm = place.attention_added if attention else place.mlp_added
    return lambda raw: _run(norm, raw)


def _projected(projection: nn.Module, z: Tensor) -> Tensor:
    """W_O z + b, from the weight itself where it is plain and in memory, else by the module's own arithmetic."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if type(projection) is nn.Linear and isinstance(weight, Tensor) and weight.device.type != "meta":
        return nn.functional.linear(z.to(weight.device), weight, bias)
    return _run(projection, z)


def _run(module: nn.Module, value: Tensor) -> Tensor:
    """Call a module past its torch hooks, so that nothing is recorded twice; accelerate's offloading still works."""
    result: Tensor = module.forward(value)
    return result
