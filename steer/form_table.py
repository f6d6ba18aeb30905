"""What each form can express: the table of DESIGN §4 as functions of an intervention and a model's anatomy.

Every function returns verdicts, one per part of the model that the form would touch. What vLLM runs is not told twice: it is
what `steer.backends.vllm.lowering` has rows for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import Matrix
from steer.backends.vllm.lowering import places_of
from steer.directions import unit_vector
from steer.errors import SteerError
from steer.interventions import Add, BiasRouter, Custom, Intervention, ProjectOut, ScaleExperts, SetComponent
from steer.ranges import ranges
from steer.steering import Steering
from steer.writers import Part, bias_form, has_bias, part, writers

Form = Literal["hook", "vllm", "patch", "lora"]
Bias = Callable[[Matrix], Tensor | None]
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
    "router_logits": "router",
    "router": "router",
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


def hook(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    """Everything, wherever the site exists."""
    if isinstance(intervention, ScaleExperts | BiasRouter):
        return [Verdict("router", intervention.active_layers, note=experts_note(intervention, anatomy))]
    if intervention.site in ("z", "head_out"):
        return _with_heads(intervention, anatomy, PLACES[intervention.site], _heads_note(intervention))
    if intervention.site != "mlp_raw":
        return [Verdict(PLACES[intervention.site], intervention.active_layers, note=_heads_note(intervention))]
    return _dense_only(intervention, anatomy, PLACES["mlp_raw"])


def vllm(intervention: Intervention, anatomy: Anatomy) -> list[Verdict]:
    """What has rows in vLLM, in every phase; heads in phase `all` by the patch or by LoRA, which hold them as weights."""
    layers, place = intervention.active_layers, PLACES[intervention.site]
    if in_weights(intervention):
        return _with_heads(intervention, anatomy, place, SERVED)
    note = experts_note(intervention, anatomy) if isinstance(intervention, ScaleExperts | BiasRouter) else ""
    reason, remedy = _refusal(intervention) or (None, None)
    return [Verdict(place, layers, reason, remedy, "" if reason else note)]


def vllm_together(steering: Steering) -> tuple[str, str] | None:
    """Why vLLM cannot run interventions in one request that it could run apart, and what to do; None where it can."""
    acting = [each for each in steering.interventions if not in_weights(each)]
    return _refusal(*acting) if acting and not any(_refusal(each) for each in acting) else None


def in_weights(intervention: Intervention) -> bool:
    """Whether an intervention is one of heads that vLLM runs as weights: a checkpoint, or an adapter."""
    heads = isinstance(intervention, ProjectOut) and intervention.site == "head_out"
    return heads and intervention.phase == "all"


def _refusal(*interventions: Intervention) -> tuple[str, str] | None:
    try:
        places_of(Steering(interventions))
    except SteerError as error:
        return error.found, error.remedy or HOOK
    return None


def patch(intervention: Intervention, anatomy: Anatomy, untie: bool = False) -> list[Verdict]:
    """Weights and biases, in memory or on disk.

    The weight of a chosen expert multiplies what its output projection writes, so scaling that projection (and its bias)
    is scaling the weight, whatever was chosen.

    Args:
        intervention: what is to be said.
        anatomy: of the model.
        untie: the vocabulary head gets a matrix of its own, so that a tied embedding may change.
    """
    refused = _weights_only(
        intervention, "a patch of weights", "weights act on every token alike, by a fixed linear map"
    )
    if refused is not None:
        return [Verdict(PLACES[intervention.site], intervention.active_layers, *refused)]
    if isinstance(intervention, ScaleExperts | BiasRouter):
        return [_experts(intervention, anatomy)]
    if isinstance(intervention, Add):
        return _bias(intervention, anatomy)
    return _projected(intervention, anatomy, untie, experts=True)


def lora(intervention: Intervention, anatomy: Anatomy, bias: Bias) -> list[Verdict]:
    """Projections as adapters of low rank; an adapter holds no bias.

    Args:
        intervention: what is to be said.
        anatomy: of the model.
        bias: returns the bias that goes with a matrix, None where there is none.
    """
    refused = _weights_only(intervention, "an adapter", "weights act on every token alike, by a fixed linear map")
    if refused is not None:
        return [Verdict(PLACES[intervention.site], intervention.active_layers, *refused)]
    if isinstance(intervention, ScaleExperts | BiasRouter):
        reason = "a matrix times a number differs from it by a matrix of full rank, which no adapter of low rank is"
        if isinstance(intervention, BiasRouter):
            reason = "which experts are chosen is not changed by an addition of low rank to a matrix"
        patched = _experts(intervention, anatomy).reason is None
        remedy = "Use the patch or the hook form" if patched else HOOK
        return [Verdict("router", intervention.active_layers, reason, remedy)]
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
    for verdict in _projected(intervention, anatomy, experts=True):
        behind = part(intervention.site, anatomy)
        if verdict.reason is None and behind is not None and isinstance(intervention, ProjectOut):
            found += _bias_kept(verdict, intervention, anatomy, bias)
        else:
            found.append(verdict)
    return found


def _bias_kept(verdict: Verdict, intervention: ProjectOut, anatomy: Anatomy, bias: Bias) -> list[Verdict]:
    """An adapter leaves the bias as it is, so the bias must have nothing to project out."""
    behind, against = part(intervention.site, anatomy), []
    assert behind is not None, "a projection behind a site"
    for layer in verdict.layers:
        held = [bias(matrix) for matrix in writers(anatomy, behind.module, layer)]
        if any(each is not None and along(each, intervention.direction[layer]) for each in held):
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


def along(bias: Tensor, vector: Tensor) -> bool:
    """Whether a bias has a component along v̂ beyond the rounding of its own dtype."""
    wide = bias.detach().cpu().double()
    component = abs(float(torch.dot(wide, unit_vector(vector).double())))
    return component > torch.finfo(bias.dtype).eps * float(wide.norm())


def _weights_only(intervention: Intervention, form: str, why: str) -> tuple[str, str] | None:
    """Refuse what none of the other forms says: calls, set values, and phases."""
    if isinstance(intervention, SetComponent | Custom):
        return f"{form} cannot {_verb(intervention)}: {why}", HOOK
    if intervention.phase != "all":
        return f"{form} cannot act in phase {intervention.phase!r} only: {why}", f"{HOOK}, or phase='all'"
    return None


def _experts(intervention: ScaleExperts | BiasRouter, anatomy: Anatomy) -> Verdict:
    """What weights say of a change at a router in phase all: factors, where nothing is divided by their sum."""
    layers = intervention.active_layers
    if isinstance(intervention, BiasRouter):
        reason = "which experts are chosen depends on what the router makes of each token, not on what the experts are"
        remedy = f"{HOOK}; ScaleExperts with beta 0 takes an expert out of the sum, and that has a patch form"
        return Verdict("router", layers, reason, remedy)
    if intervention.renormalise:
        reason = "weights that keep their sum depend on which experts a token chose beside those that are scaled"
        return Verdict("router", layers, reason, f"{HOOK}, or renormalise=False")
    biased = has_bias(anatomy, Matrix(layers[0], "expert_down", intervention.in_layer(layers[0])[0]))
    parts = "weight and bias" if biased else "weight"
    return Verdict("expert down", layers, note=f"{experts_note(intervention, anatomy)}, {parts}")


def experts_note(intervention: ScaleExperts | BiasRouter, anatomy: Anatomy) -> str:
    """Return "experts 2 of 48x128": those named, of layers with experts times experts in each."""
    return f"experts {len(intervention.experts)} of {len(anatomy.expert_layers)}x{anatomy.experts}"


def _bias(intervention: Add, anatomy: Anatomy) -> list[Verdict]:
    behind = part(intervention.site, anatomy)
    if behind is None:
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
    if behind.contribution.kind == "norm" and not raw:
        site = "attn_raw" if behind.module == "attention_output" else "mlp_raw"
        return [
            Verdict(
                f"{behind.word} bias",
                intervention.active_layers,
                f"a norm ({behind.contribution.norm}) stands between the bias and {intervention.site}",
                f"Use {site}, in front of the norm",
            )
        ]
    end = anatomy.record.layer_end
    if intervention.site == "resid_post" and end is not None:
        return [
            Verdict(
                f"{behind.word} bias",
                intervention.active_layers,
                f"the layer goes on after the MLP ({', '.join(filter(None, [end.scale, *end.extra]))}), so what a bias adds is not what is added at resid_post",
                "Use mlp_out",
            )
        ]
    divided = (
        f"b += a v / {behind.contribution.multiplier:g}"
        if behind.contribution.kind == "scale" and not raw
        else "b += a v"
    )
    if intervention.site != "mlp_raw":
        return _biases(intervention.active_layers, anatomy, behind, divided)
    dense = tuple(layer for layer in intervention.active_layers if layer in anatomy.dense_mlp_layers)
    refused = [row for row in _dense_only(intervention, anatomy, f"{behind.word} bias") if row.reason is not None]
    return _biases(dense, anatomy, behind, divided) + refused


def _biases(layers: Sequence[int], anatomy: Anatomy, behind: Part, divided: str) -> list[Verdict]:
    """One row per answer: layers that have a bias, that get one, and that cannot have one."""
    rows: dict[tuple[str | None, str | None], list[int]] = {}
    for layer in layers:
        rows.setdefault(bias_form(anatomy, behind.module, layer), []).append(layer)
    found = []
    for (note, reason), those in rows.items():
        said = divided if not note else f"{divided}, {note}"
        found.append(
            Verdict(f"{behind.word} bias", tuple(those), reason, HOOK if reason else None, "" if reason else said)
        )
    return found


def _projected(
    intervention: Intervention, anatomy: Anatomy, untie: bool = False, experts: bool = False
) -> list[Verdict]:
    layers, site = intervention.active_layers, intervention.site
    if site == "head_out":
        return _with_heads(intervention, anatomy, "attention output", _heads_note(intervention))
    behind = part(site, anatomy) if not site.startswith("resid") else None
    if behind is None:
        return _embedding(intervention, anatomy, untie)
    if behind.contribution.kind == "norm" and not site.endswith("_raw"):
        reason = f"a norm ({behind.contribution.norm}) stands between the projection and {site}"
        return [Verdict(behind.word, layers, reason, f"{HOOK}, or project at head_out")]
    if behind.module == "mlp_output":
        return _dense_only(intervention, anatomy, behind.word, "weight and bias", experts and site == "mlp_out")
    return [Verdict(behind.word, layers, note="weight and bias")]


def _embedding(intervention: Intervention, anatomy: Anatomy, untie: bool) -> list[Verdict]:
    if intervention.site == "resid_pre" and intervention.active_layers == (0,):
        if anatomy.extra_writers:
            reason = f"{', '.join(anatomy.extra_writers)} of every layer works on the embedding too, past the residual stream"
            return [Verdict("embedding", (0,), reason, HOOK)]
        if anatomy.tied and not untie:
            return [
                Verdict(
                    "embedding",
                    (0,),
                    "the embedding is tied to the vocabulary head, which the edit would change too",
                    f"{HOOK}, or untie the head (untie=True, `--untie`)",
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


def _dense_only(
    intervention: Intervention, anatomy: Anatomy, what: str, note: str = "", experts: bool = False
) -> list[Verdict]:
    """One row for layers with one MLP projection, one for those with experts, refused unless `experts`."""
    dense = tuple(layer for layer in intervention.active_layers if layer in anatomy.dense_mlp_layers)
    others = tuple(layer for layer in intervention.active_layers if layer not in anatomy.dense_mlp_layers)
    rows = [Verdict(what, dense, note=note)] if dense else []
    if experts:
        plain = tuple(layer for layer in others if layer in anatomy.expert_layers)
        packed = tuple(layer for layer in others if layer not in anatomy.expert_layers)
        if plain:
            number = len(writers(anatomy, "mlp_output", plain[0]))
            rows.append(Verdict(what, plain, note=f"{note} of {number} matrices a layer"))
        if packed:
            reason = "not all of the layer's experts are in plain tensors"
            rows.append(Verdict(what, packed, reason, f"{HOOK}, or take the unquantised model"))
    elif others:
        rows.append(
            Verdict(
                what,
                others,
                "the layer has experts, whose outputs are weighted and summed, and no single MLP projection",
                "Use mlp_out in the hook form",
            )
        )
    return rows


def _with_heads(intervention: Intervention, anatomy: Anatomy, what: str, note: str) -> list[Verdict]:
    """One row for layers that have the site, and one for each reason why others do not, such as linear attention."""
    having = anatomy.site_layers(intervention.site)
    rows: dict[str | None, list[int]] = {}
    for layer in intervention.active_layers:
        reason = None if layer in having else f"the layer {anatomy.lacks(intervention.site, layer)}"
        rows.setdefault(reason, []).append(layer)
    remedy = "Use attn_raw or attn_out, which every layer has"
    return [
        Verdict(what, tuple(layers), reason, remedy if reason else None, "" if reason else note)
        for reason, layers in rows.items()
    ]


def layers_of(verdict: Verdict) -> str:
    """Return "layer 3" or "layers 0-3, 7"."""
    return f"layer{'s' * (len(verdict.layers) != 1)} {ranges(verdict.layers)}"


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
        ScaleExperts: "scale the weights of experts",
        BiasRouter: "change the logits of a router",
    }[type(intervention)]
