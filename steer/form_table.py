"""What each form can express: the table of DESIGN §4 as functions of an intervention and a model's anatomy.

Every function returns verdicts, one per part of the model that the form would touch. The table speaks of what a form
*can* say; whether this version has the code for it is a second question, answered in `steer.coverage`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steer.anatomy.resolve import Anatomy, Contributes
from steer.directions import unit_vector
from steer.interventions import Add, Custom, Intervention, ProjectOut, SetComponent

Form = Literal["hook", "vllm", "patch", "lora"]
Bias = Callable[[str, int], Tensor | None]
HOOK = "Use the hook form"
SERVED = "as the patched checkpoint, or per request as LoRA"
PLACES = {
    "resid_pre": "residual stream before the layer",
    "resid_mid": "residual stream after attention",
    "resid_post": "residual stream after the layer",
    "z": "attention heads",
    "head_out": "attention output",
    "attn_raw": "attention output",
    "attn_out": "attention output",
    "mlp_raw": "MLP output",
    "mlp_out": "MLP output",
}


@dataclass(frozen=True)
class Verdict:
    """What a form can do for one part of the model.

    Attributes:
        what: the part, in the reader's words.
        layers: the layers asked for.
        reason: why the form cannot express it; None where it can.
        remedy: what can.
        note: what the reader should know where it can, such as the rank.
    """

    what: str
    layers: tuple[int, ...]
    reason: str | None = None
    remedy: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A projection that writes to the residual stream, and what happens between its output and the stream."""

    module: str
    word: str
    contribution: Contributes


def hook(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    """Everything, wherever the site exists."""
    if intervention.site != "mlp_raw":
        return [Verdict(PLACES[intervention.site], intervention.active_layers, note=_heads_note(intervention))]
    return _dense_only(intervention, anatomy, PLACES["mlp_raw"])


def vllm(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    """Additions and projections on every token at what is added to the stream; heads by the patch or by LoRA."""
    layers, place = intervention.active_layers, PLACES[intervention.site]
    if intervention.site == "head_out":
        return [Verdict(place, layers, note=SERVED)]
    refused = _weights_only(intervention, "vLLM", "nothing is stated for it there yet")
    allowed = {Add: ("attn_out", "mlp_out", "resid_mid", "resid_post"), ProjectOut: ("attn_out", "mlp_out")}
    first = isinstance(intervention, ProjectOut) and intervention.site == "resid_pre" and layers == (0,)
    if refused is None and intervention.site not in allowed[type(intervention)] and not first:
        refused = (f"vLLM cannot {_verb(intervention)} at {intervention.site}", HOOK)
    return [Verdict(place, layers, *(refused or (None, None)))]


def patch(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    """Weights and biases on disk."""
    refused = _weights_only(
        intervention, "a patch of weights", "weights act on every token alike, by a fixed linear map"
    )
    if refused is not None:
        return [Verdict(PLACES[intervention.site], intervention.active_layers, *refused)]
    if isinstance(intervention, Add):
        return _bias(intervention, anatomy)
    return _projected(intervention, anatomy)


def lora(intervention: Intervention, anatomy: Anatomy, bias: Bias) -> list[Verdict]:
    """Projections as adapters of low rank; an adapter holds no bias.

    Args:
        intervention: what is to be said.
        anatomy: of the model.
        bias: returns the bias of (module, layer), None where there is none.
    """
    refused = _weights_only(intervention, "an adapter", "weights act on every token alike, by a fixed linear map")
    if refused is not None:
        return [Verdict(PLACES[intervention.site], intervention.active_layers, *refused)]
    if isinstance(intervention, Add):
        return [
            Verdict(
                PLACES[intervention.site],
                intervention.active_layers,
                "an adapter is a product with the input and holds no bias, so it cannot add a vector",
                HOOK,
            )
        ]
    found = []
    for verdict in _projected(intervention, anatomy):
        part = _part(intervention.site, anatomy)
        if verdict.reason is None and part is not None and isinstance(intervention, ProjectOut):
            found += _bias_kept(verdict, intervention, part, bias)
        else:
            found.append(verdict)
    return found


def _bias_kept(verdict: Verdict, intervention: ProjectOut, part: Part, bias: Bias) -> list[Verdict]:
    """An adapter leaves the bias as it is, so the bias must have nothing to project out."""
    against = []
    for layer in verdict.layers:
        held = bias(part.module, layer)
        if held is not None and _along(held, intervention, layer):
            against.append(layer)
    free = tuple(layer for layer in verdict.layers if layer not in against)
    rows = [Verdict(verdict.what, free)] if free else []
    if against:
        rows.append(
            Verdict(
                verdict.what,
                tuple(against),
                "the output bias has a component along the direction, and an adapter cannot change a bias",
                "Use the patch or the hook form",
            )
        )
    return rows


def _along(held: Tensor, intervention: ProjectOut, layer: int) -> bool:
    """Whether a bias has a component along v̂ beyond the rounding of its own dtype."""
    wide = held.detach().cpu().double()
    along = abs(float(torch.dot(wide, unit_vector(intervention.direction[layer]))))
    return along > torch.finfo(held.dtype).eps * float(wide.norm())


def _weights_only(intervention: Intervention, form: str, why: str) -> tuple[str, str] | None:
    """Refuse what none of the other forms says: calls, set values, and phases."""
    if isinstance(intervention, SetComponent | Custom):
        return f"{form} cannot {_verb(intervention)}: {why}", HOOK
    if intervention.phase != "all":
        return f"{form} cannot act in phase {intervention.phase!r} only: {why}", f"{HOOK}, or phase='all'"
    return None


def _bias(intervention: Add, anatomy: Anatomy) -> list[Verdict]:
    part = _part(intervention.site, anatomy)
    if part is None:
        remedy = {
            "z": "Use attn_raw with the vector that W_O makes of it",
            "resid_pre": "Use resid_post of the layer before",
        }.get(intervention.site, HOOK)
        return [
            Verdict(
                PLACES[intervention.site],
                intervention.active_layers,
                f"no single bias adds a vector at {intervention.site}",
                remedy,
            )
        ]
    raw = intervention.site.endswith("_raw")
    if part.contribution.kind == "norm" and not raw:
        site = "attn_raw" if part.module == "attention_output" else "mlp_raw"
        return [
            Verdict(
                f"{part.word} bias",
                intervention.active_layers,
                f"a norm ({part.contribution.norm}) stands between the bias and {intervention.site}",
                f"Use {site}, in front of the norm",
            )
        ]
    divided = (
        f"b += a v / {part.contribution.multiplier:g}" if part.contribution.kind == "scale" and not raw else "b += a v"
    )
    if part.module == "mlp_output":
        return _dense_only(intervention, anatomy, f"{part.word} bias", divided)
    return [Verdict(f"{part.word} bias", intervention.active_layers, note=divided)]


def _projected(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    layers, site = intervention.active_layers, intervention.site
    if site == "head_out":
        return [Verdict("attention output", layers, note=_heads_note(intervention))]
    part = _part(site, anatomy) if not site.startswith("resid") else None
    if part is None:
        return _embedding(intervention, anatomy)
    if part.contribution.kind == "norm" and not site.endswith("_raw"):
        reason = f"a norm ({part.contribution.norm}) stands between the projection and {site}"
        return [Verdict(part.word, layers, reason, f"{HOOK}, or project at head_out")]
    if part.module == "mlp_output":
        return _dense_only(intervention, anatomy, part.word, "weight and bias")
    return [Verdict(part.word, layers, note="weight and bias")]


def _embedding(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    if intervention.site == "resid_pre" and intervention.active_layers == (0,):
        if anatomy.tied:
            return [
                Verdict(
                    "embedding",
                    (0,),
                    "the embedding is tied to the vocabulary head, which the edit would change too",
                    f"{HOOK}, or untie the head first",
                )
            ]
        return [Verdict("embedding", (0,))]
    remedy = "Project at resid_pre of layer 0 and at attn_out and mlp_out of every layer, which takes the direction out of every writer"
    return [
        Verdict(
            PLACES[intervention.site],
            intervention.active_layers,
            f"no matrix writes everything that is read at {intervention.site}",
            remedy,
        )
    ]


def _part(site: str, anatomy: Anatomy) -> Part | None:
    """The projection behind a site; adding at resid_mid or resid_post is adding at attn_out or mlp_out."""
    if site in ("attn_raw", "attn_out", "resid_mid"):
        return Part("attention_output", "attention output", anatomy.attention_contribution)
    if site in ("mlp_raw", "mlp_out", "resid_post"):
        return Part("mlp_output", "MLP output", anatomy.mlp_contribution)
    return None


def _dense_only(intervention: Intervention, anatomy: Anatomy, what: str, note: str = "") -> list[Verdict]:
    dense = tuple(layer for layer in intervention.active_layers if layer in anatomy.dense_mlp_layers)
    experts = tuple(layer for layer in intervention.active_layers if layer not in anatomy.dense_mlp_layers)
    rows = [Verdict(what, dense, note=note)] if dense else []
    if experts:
        rows.append(
            Verdict(
                what,
                experts,
                "the layer has experts, whose outputs are weighted and summed, and no single MLP projection",
                "Use mlp_out in the hook form",
            )
        )
    return rows


def counted(number: int, noun: str) -> str:
    """Return "1 head", "3 heads"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _heads_note(intervention: Intervention) -> str:
    heads = intervention.heads if isinstance(intervention, ProjectOut) else None
    return counted(len(heads), "head") if heads else ""


def _verb(intervention: Intervention) -> str:
    return {
        Add: "add a vector",
        ProjectOut: "project a direction out",
        SetComponent: "set a component",
        Custom: "call a function",
    }[type(intervention)]
