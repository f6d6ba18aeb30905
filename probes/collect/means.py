"""Means of activations over spans of a trace, one masked matrix product per layer and site.

`SpanMeans` keeps mean_t(h_t) for positions t in a span. `HeadMeans` keeps the same of `z`, per query head, and on
families whose attention output passes a norm before it is added also mean_t(z_t / rms_t), where rms_t =
sqrt(mean_i(attn_raw_t,i ^ 2) + eps) is the norm's own denominator: with it head scores stay linear in z (DESIGN §4, end;
arXiv 2503.22048 for the score itself).

The product is made in float32 whatever the model's dtype; only (trace, span, layer, width) leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from probes.collect.reader import Shaped
from probes.collect.recorders import Batch, Kept, Layers, Prepared
from steer.errors import SteerError
from steer.sites import site as known_site
from steer.spans import check_span

if TYPE_CHECKING:
    from steer.model import SteerableModel

OVER_RMS = "z_over_rms"


def quantity(site: str, span: str) -> str:
    """Return the name under which the mean of a site over a span is kept."""
    return f"{site}/{span}"


@dataclass(frozen=True)
class SpanMeans:
    """Mean over each span of every trace, at each site and layer.

    Attributes:
        sites: names of `steer.sites`, readable ones.
        spans: names of DESIGN §2.
    """

    sites: tuple[str, ...] = ("resid_mid",)
    spans: tuple[str, ...] = ("predicts_thinking",)
    name = "span_means"

    def __post_init__(self) -> None:
        check_spans(self.spans)
        if not self.sites:
            raise SteerError("no site was asked for", "at least one, such as resid_mid")
        for name in self.sites:
            if not known_site(name).has_vectors:
                raise SteerError(
                    f"the site {name!r} has no vector per token",
                    "a site whose values are activations",
                    "Read z and use head scores, or read attn_raw; for routers use RouterCounts",
                )

    def options(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return {"sites": list(self.sites), "spans": list(self.spans)}

    def prepare(self, model: Shaped, layers: Layers) -> Prepared:
        """Return what it reads and keeps: `site/span` of shape (layer, hidden) or (layer, heads, head width).

        Raises:
            SteerError: `mlp_raw` of layers that all have experts.
        """
        where = {name: layers_with(model, name, layers) if name == "mlp_raw" else layers for name in self.sites}
        keeps = {
            quantity(name, span): Kept((len(where[name]), *width(model, name)), where[name], span)
            for name in self.sites
            for span in self.spans
        }
        return Prepared(where, self.spans, keeps, lambda batch: _SpanPass(batch, self.spans))


@dataclass(frozen=True)
class HeadMeans:
    """Mean of z over each span, per query head; on norm families also of z / rms."""

    spans: tuple[str, ...] = ("predicts_thinking",)
    name = "head_means"

    def __post_init__(self) -> None:
        check_spans(self.spans)

    def options(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self) | {"spans": list(self.spans)}

    def prepare(self, model: SteerableModel, layers: Layers) -> Prepared:
        """Return what it reads and keeps: `z/span`, on norm families also `z_over_rms/span`."""
        shape = (len(layers), *width(model, "z"))
        epsilon = norm_epsilon(model)
        names = ("z",) if epsilon is None else ("z", OVER_RMS)
        keeps = {quantity(name, span): Kept(shape, layers, span) for name in names for span in self.spans}
        if epsilon is None:
            return Prepared({"z": layers}, self.spans, keeps, lambda batch: _SpanPass(batch, self.spans))
        return Prepared(
            {"z": layers, "attn_raw": layers}, self.spans, keeps, lambda batch: _NormPass(batch, self.spans, epsilon)
        )


def check_spans(spans: tuple[str, ...]) -> None:
    """Refuse spans that do not exist, and none at all.

    Raises:
        SteerError: an unknown name, an unreadable marker, or no span.
    """
    if not spans:
        raise SteerError("no span was asked for", "at least one, such as thinking")
    for span in spans:
        check_span(span)


def layers_with(model: Shaped, site: str, layers: Layers) -> Layers:
    """Return those of the layers that have a site.

    Raises:
        SteerError: none has.
    """
    having = model.anatomy.site_layers(site)
    found = tuple(layer for layer in layers if layer in having)
    if not found:
        raise SteerError(
            f"none of the layers {list(layers)} of this {model.anatomy.family} model has {site}",
            f"layers among {list(having)}" if having else "a site that it has",
        )
    return found


def width(model: Shaped, name: str) -> tuple[int, ...]:
    """Return the shape of one token's value at a site: (hidden,) or (heads, head width)."""
    anatomy = model.anatomy
    return (anatomy.heads, anatomy.head_width) if known_site(name).per_head else (anatomy.hidden,)


class _SpanPass:
    """Means of any sites over any spans during one forward pass."""

    def __init__(self, batch: Batch, spans: tuple[str, ...]) -> None:
        self.batch, self.spans = batch, spans
        self.means: dict[str, list[Tensor]] = {}

    def observe(self, site: str, layer: int, value: Tensor) -> None:
        """Reduce the tokens of one layer to one mean per trace and span."""
        self.keep(site, value, self.batch.weights(self.spans, value.device))

    def keep(self, name: str, value: Tensor, weights: Float[Tensor, "trace span token"]) -> None:
        """Append the weighted sum over tokens under `name`; layers arrive in order."""
        flat = value.flatten(2).float()
        mean = torch.bmm(weights, flat).reshape(*weights.shape[:2], *value.shape[2:])
        self.means.setdefault(name, []).append(mean)

    def rows(self, final: Sequence[Float[Tensor, "_ hidden"]]) -> dict[str, Tensor]:
        """Return (trace, layer, ...) per site and span, on the CPU, in float32."""
        found: dict[str, Tensor] = {}
        for name, layers in self.means.items():
            stacked = torch.stack([mean.cpu() for mean in layers], dim=2)
            for column, span in enumerate(self.spans):
                found[quantity(name, span)] = stacked[:, column].contiguous()
        return found


class _NormPass(_SpanPass):
    """z, and z over the root mean square of the same layer's raw attention output."""

    def __init__(self, batch: Batch, spans: tuple[str, ...], epsilon: float) -> None:
        super().__init__(batch, spans)
        self.epsilon = epsilon
        self.z: Tensor | None = None

    def observe(self, site: str, layer: int, value: Tensor) -> None:
        """Hold z until the projection's output, which comes next in the same layer, gives its norm."""
        weights = self.batch.weights(self.spans, value.device)
        if site == "z":
            self.keep(site, value, weights)
            self.z = value
            return
        if self.z is None:
            raise RuntimeError(f"attn_raw of layer {layer} came before its z")
        inverse = torch.rsqrt(value.float().square().mean(-1) + self.epsilon)
        self.keep(OVER_RMS, self.z, weights * inverse[:, None, :])
        self.z = None


def norm_epsilon(model: SteerableModel) -> float | None:
    """Return the epsilon of the norm after attention; None on families without one.

    Raises:
        SteerError: the norm does not say its epsilon.
    """
    if model.anatomy.attention_contribution.kind != "norm":
        return None
    norm = model.places.layers[0].attention_added
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    raise SteerError(
        f"the norm after attention ({type(norm).__name__}) has neither `variance_epsilon` nor `eps`",
        "its epsilon",
        "Read attn_out with SpanMeans instead; head scores need the norm's denominator",
    )
