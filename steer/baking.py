"""Baking: a steering as operations on weights, row by row of DESIGN §4 (`steer.form_table` says what has no such form).

With v the direction of a layer, v̂ its unit vector, a and w the strengths, W and b the output projection and its bias:

    Add at attn_raw, mlp_raw                          b += a v
    Add at attn_out, mlp_out, resid_mid, resid_post   b += (a / m) v, where what is added to the stream is m times raw
    ProjectOut at attn_raw, attn_out, mlp_raw, mlp_out   W, b <- (I - w v̂v̂ᵀ) W, (I - w v̂v̂ᵀ) b
    ProjectOut at head_out                            W[:, columns of the heads] <- (I - w v̂v̂ᵀ) W[:, columns of the heads]
    ProjectOut at resid_pre of layer 0                E <- E (I - w v̂v̂ᵀ), for the embedding E (vocab, hidden)
    ScaleExperts at router                            W, b <- beta W, beta b of the down projections of its experts

In a layer with experts the output is a sum of weighted outputs, so projecting every expert's down projection (bias
too) and the shared expert's projects the sum, whatever the weights. Adding a vector is another matter: added to every
expert it arrives times the sum of the weights, so only where that sum is always the same number can it be said. The
weight w of one expert multiplies its output W h + b, and (beta w)(W h + b) = w (beta W h + beta b): bit by bit where
beta is a power of two and nothing leaves the range of the dtype.

Operations stand in the order in which the hooks act: along the forward pass, then as the steering lists them. So a
projection at `attn_out` also takes out of the bias what an addition at `attn_raw` put there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from steer import form_table
from steer.anatomy.resolve import Anatomy
from steer.anatomy.slots import Matrix
from steer.directions import Direction
from steer.errors import SteerError
from steer.identity import ModelIdentity
from steer.interventions import Add, Intervention, ProjectOut, ScaleExperts
from steer.operations import AddBias, Operation, ProjectColumns, Scale
from steer.sites import site
from steer.steering import Steering
from steer.writers import has_bias, part, weights_sum, writers

if TYPE_CHECKING:
    from steer.model import SteerableModel


def operations_for(
    steering: Steering, model: SteerableModel | Anatomy | str | Path | None, untie: bool = False
) -> tuple[Operation, ...]:
    """Return the operations that do what a steering does; see `steer.patches.Patch.from_steering`.

    Raises:
        SteerError: the steering does not fit the model; an intervention has no patch form there.
    """
    anatomy = _anatomy(steering, model)
    made: list[Operation] = []
    for each in sorted(steering.interventions, key=lambda each: site(each.site).order):
        _refuse(each, anatomy, untie)
        made += _of(each, anatomy, made)
    return tuple(made)


def _anatomy(steering: Steering, model: SteerableModel | Anatomy | str | Path | None) -> Anatomy | None:
    if model is None:
        return None
    if isinstance(model, Anatomy):
        steering.check(model)
        return model
    from steer.targets import target_of  # It imports this module's neighbours, which import the patches.

    target = target_of(model)
    steering.check(target.anatomy, target.identity)
    return target.anatomy


def _refuse(each: Intervention, anatomy: Anatomy | None, untie: bool) -> None:
    what = f"{type(each).__name__} at {each.site} in phase {each.phase}"
    if anatomy is None:
        if not (isinstance(each, ProjectOut) and each.site == "head_out" and each.phase == "all"):
            raise SteerError(
                f"{what} has a patch form, if any, only for a known model",
                "the model, its anatomy or its folder",
                "Pass it: Patch.from_steering(steering, model); or use the hook form, `model.steered(steering)`",
            )
        return
    for verdict in form_table.patch(each, anatomy, untie):
        if verdict.reason is not None:
            raise SteerError(
                f"{what} has no patch form on this {anatomy.family} model, {form_table.layers_of(verdict)}: {verdict.reason}",
                "",
                f"{verdict.remedy}; the hook form is `model.steered(steering)`",
            )


def _of(each: Intervention, anatomy: Anatomy | None, made: Sequence[Operation]) -> list[Operation]:
    if isinstance(each, ProjectOut) and each.heads is not None:
        return [
            ProjectColumns(
                layer,
                "attention_output",
                tuple(head for at, head in each.heads if at == layer),
                each.direction[layer],
                each.weight,
            )
            for layer in each.active_layers
        ]
    assert anatomy is not None, "everything else was refused without one"
    if isinstance(each, Add):
        return list(_added(each, anatomy))
    if isinstance(each, ScaleExperts):
        return list(_scaled(each, anatomy))
    assert isinstance(each, ProjectOut), "the table refuses everything else"
    if each.site == "resid_pre":
        return [ProjectColumns(-1, "embedding", None, each.direction[0], each.weight)]
    return list(_projected(each, anatomy, made))


def _added(add: Add, anatomy: Anatomy) -> Iterator[Operation]:
    behind = part(add.site, anatomy)
    assert behind is not None, "the table refuses a site without a projection"
    multiplier = 1.0 if add.site.endswith("_raw") else behind.contribution.multiplier
    for layer in add.active_layers:
        first, *others = writers(anatomy, behind.module, layer)
        weight = add.coefficient / (multiplier * weights_sum(anatomy, behind.module, layer))
        added = AddBias(layer, first.module, add.direction[layer], weight, first.expert)
        yield added
        for other in others:
            if other.module == first.module:  # Every expert; the shared one's share is no part of their sum.
                yield replace(added, expert=other.expert)


def _projected(project: ProjectOut, anatomy: Anatomy, made: Sequence[Operation]) -> Iterator[Operation]:
    behind = part(project.site, anatomy)
    assert behind is not None, "the table refuses a site without a projection"
    grown = {operation.matrix for operation in made if isinstance(operation, AddBias)}
    for layer in project.active_layers:
        vector = project.direction[layer]
        for target in writers(anatomy, behind.module, layer):
            named = (target.layer, target.module, None, vector, project.weight, target.expert)
            yield ProjectColumns(*named)
            bias = Matrix(target.layer, target.module, target.expert, bias=True)
            if bias in grown or has_bias(anatomy, target):
                yield ProjectColumns(*named, bias=True)


def _scaled(scale: ScaleExperts, anatomy: Anatomy) -> Iterator[Operation]:
    for layer, expert in scale.experts:
        down = Matrix(layer, "expert_down", expert)
        yield Scale(down, scale.beta)
        if has_bias(anatomy, down):
            yield Scale(replace(down, bias=True), scale.beta)


def hook_form(
    matrices: Mapping[Matrix, Sequence[Operation]], model: ModelIdentity | None, measured_at: str
) -> Steering:
    """Return the steering that projections of heads came from; see `steer.patches.Patch.steering`.

    Args:
        matrices: the operations of every matrix, in order.
        model: that they were made for.
        measured_at: the site of their vectors.

    Raises:
        SteerError: an operation is no projection of heads.
    """
    groups: dict[tuple[int, float], list[ProjectColumns]] = {}
    for matrix, operations in matrices.items():
        for turn, operation in enumerate(operations):
            if not (isinstance(operation, ProjectColumns) and operation.heads):
                raise SteerError(
                    f"the operation on {matrix} is a {type(operation).__name__}",
                    "ProjectColumns of heads",
                    "Use the patch itself, `patch.on(model)`",
                )
            groups.setdefault((turn, operation.weight), []).append(operation)
    return Steering(tuple(_project_out(groups[key], model, measured_at) for key in sorted(groups)), model)


def _project_out(operations: Sequence[ProjectColumns], model: ModelIdentity | None, measured_at: str) -> ProjectOut:
    vectors = torch.stack([operation.vector for operation in operations])
    direction = Direction(vectors, tuple(operation.layer for operation in operations), measured_at, model)
    heads = tuple((operation.layer, head) for operation in operations for head in operation.heads or ())
    return ProjectOut(direction, "head_out", operations[0].weight, heads=heads)
