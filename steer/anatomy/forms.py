"""How many layers each form of change reaches on a model, from its headers alone (the table of DESIGN §4).

`steer.coverage` answers for one change and its vectors; this is the outline that `steer inspect` prints without
importing torch. The tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from steer.anatomy.packed import METHOD
from steer.anatomy.resolve import Anatomy, Contributes
from steer.writers import bias_form, has_bias, part, writers

FORMS = ("hook", "vllm", "patch", "lora")
ADDED, PROJECTED, SCALED = "Add", "ProjectOut", "ScaleExperts"
CHANGES = (
    (PROJECTED, "head_out"),
    (PROJECTED, "attn_out"),
    (PROJECTED, "mlp_out"),
    (ADDED, "attn_out"),
    (ADDED, "attn_raw"),
    (ADDED, "mlp_out"),
    (ADDED, "mlp_raw"),
)
OF_EXPERTS = ((SCALED, "router"),)


@dataclass(frozen=True)
class Reach:
    """How far one form reaches with one kind of change, phase `all`.

    Attributes:
        change: such as "Add at attn_out".
        form: one of FORMS.
        layers: how many layers it can express the change on.
        total: layers of the model.
        why: the reason, where it is not every layer.
    """

    change: str
    form: str
    layers: int
    total: int
    why: str = ""

    def __str__(self) -> str:
        return f"{self.layers}/{self.total}"


def reaches(anatomy: Anatomy, quantised: str = "") -> list[Reach]:
    """Return every kind of change in every form; those of experts where the model has some.

    Args:
        anatomy: of the model.
        quantised: the method, empty for plain weights.
    """
    changes = (*CHANGES, *OF_EXPERTS) if anatomy.expert_layers else CHANGES
    return [_reach(anatomy, quantised, kind, site, form) for kind, site in changes for form in FORMS]


def _reach(anatomy: Anatomy, quantised: str, kind: str, site: str, form: str) -> Reach:
    total, dense = anatomy.layers, len(anatomy.dense_mlp_layers)
    if kind == SCALED:
        layers, why = _of_experts(anatomy, quantised, form)
        return Reach(f"{kind} at {site}", form, layers, total, why)
    layers, why = total, ""
    contribution: Contributes = anatomy.mlp_contribution if site.startswith("mlp") else anatomy.attention_contribution
    if form == "vllm" and site.endswith("_raw"):
        layers, why = 0, f"{kind} at {site} has no form in vLLM"
    elif form == "lora" and kind == ADDED:
        layers, why = 0, "an adapter holds no bias"
    elif form in ("patch", "lora") and site.endswith("_out") and site != "head_out" and contribution.kind == "norm":
        layers, why = 0, f"a norm ({contribution.norm}) stands between the projection and {site}"
    elif form == "patch" and quantised:
        layers, why = 0, f"the weights are quantised ({quantised})"
    elif site.startswith("mlp") and dense < total and site == "mlp_raw":
        layers, why = dense, "the other layers have experts"
    elif site == "head_out" and len(anatomy.site_layers(site)) < total:
        layers, why = len(anatomy.site_layers(site)), "the other layers have linear attention, without heads"
    if form == "patch" and kind == ADDED and layers:
        layers, why = _biases(anatomy, site, why)
    if form == "lora" and kind == PROJECTED and not why and _has_biases(anatomy, site):
        why = "only where the output bias has no component along the direction"
    return Reach(f"{kind} at {site}", form, layers, total, why)


def _of_experts(anatomy: Anatomy, quantised: str, form: str) -> tuple[int, str]:
    """On how many layers a form can scale experts, and why not on all."""
    if form == "lora":
        return 0, "a factor is a difference of full rank"
    if form == "patch" and quantised and quantised != METHOD:
        return 0, f"the weights are quantised ({quantised})"
    layers = len(anatomy.expert_layers)
    why = "the other layers have no experts" if layers < anatomy.layers else ""
    return layers, f"powers of two only ({METHOD})" if form == "patch" and quantised else why


def _biases(anatomy: Anatomy, site: str, why: str) -> tuple[int, str]:
    """How many layers have, or can get, an output bias that takes up a vector added at a site."""
    behind = part(site, anatomy)
    assert behind is not None, "an addition is outlined at the output of a projection"
    within = anatomy.dense_mlp_layers if site == "mlp_raw" else range(anatomy.layers)
    reasons = [bias_form(anatomy, behind.module, layer)[1] for layer in within]
    refused = [reason for reason in reasons if reason is not None]
    return len(reasons) - len(refused), why or (refused[0] if refused else "")


def _has_biases(anatomy: Anatomy, site: str) -> bool:
    """Whether a projection behind a site has a bias anywhere; at head_out biases do not count."""
    behind = part(site, anatomy)
    if behind is None:
        return False
    layers = range(anatomy.layers)
    return any(has_bias(anatomy, matrix) for layer in layers for matrix in writers(anatomy, behind.module, layer)[:1])
