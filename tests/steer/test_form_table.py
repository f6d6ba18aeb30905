"""What the table calls expressible really is: weights edited by hand, in float64, against the hook form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steer import wrap
from steer.coverage import coverage
from steer.directions import Direction
from steer.interventions import Add, Intervention, ProjectOut
from steer.model import SteerableModel
from steer.steering import Steering
from tests import tiny
from tests.steer.made import CAN_BIAS

IDS = [[5, 9, 14, 22, 31, 8], [7, 7, 40]]
LAYERS = (0, 2)
LINEAR = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite")
NORMED = ("gemma2", "gemma3_text", "olmo2")
TOLERANCE = 1e-9


def direction(seed: int = 0) -> Direction:
    return Direction(torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 48))), LAYERS, "resid_mid")


def built(family: str) -> SteerableModel:
    return wrap(*tiny.build(family, dtype=torch.float64), self_check=False)


def hooked(model: SteerableModel, *interventions: Intervention) -> Tensor:
    with model.steered(Steering(interventions)):
        return torch.cat(model.run(IDS))


def edited(model: SteerableModel, edit: Callable[[SteerableModel], None]) -> Tensor:
    """Logits of a copy whose weights were edited by hand."""
    other = wrap(copy.deepcopy(model.hf), self_check=False)
    with torch.no_grad():
        edit(other)
    return torch.cat(other.run(IDS))


def projection(model: SteerableModel, module: str, layer: int) -> nn.Module:
    found = getattr(model.places.layers[layer], module)
    assert isinstance(found, nn.Module)
    return found


def add_bias(module: str, vector: Callable[[int], Tensor]) -> Callable[[SteerableModel], None]:
    def edit(model: SteerableModel) -> None:
        for layer in LAYERS:
            linear = projection(model, module, layer)
            before = linear.bias if isinstance(linear.bias, Tensor) else torch.zeros(48, dtype=torch.float64)
            linear.bias = nn.Parameter(before + vector(layer))

    return edit


def out_of(module: str, w: float) -> Callable[[SteerableModel], None]:
    def edit(model: SteerableModel) -> None:
        for layer in LAYERS:
            linear = projection(model, module, layer)
            v = direction()[layer].double()
            keep = torch.eye(48, dtype=torch.float64) - w * torch.outer(v, v) / (v @ v)
            assert isinstance(linear.weight, Tensor)
            linear.weight.copy_(keep @ linear.weight)
            if isinstance(linear.bias, Tensor):
                linear.bias.copy_(keep @ linear.bias)

    return edit


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize(
    ("site", "module"),
    [
        ("attn_out", "attention_output"),
        ("resid_mid", "attention_output"),
        ("mlp_out", "mlp_output"),
        ("resid_post", "mlp_output"),
    ],
)
def test_an_added_vector_is_a_bias_divided_by_the_multiplier(family: str, site: str, module: str) -> None:
    model = built(family)
    a, contribution = (
        0.7,
        model.anatomy.attention_contribution if module == "attention_output" else model.anatomy.mlp_contribution,
    )
    steered = hooked(model, Add(direction(), site, a))
    rows = coverage(Steering((Add(direction(), site, a),)), model, "patch").rows
    assert rows[0].expressible == CAN_BIAS[family][module == "mlp_output"], "only where a checkpoint can hold the bias"
    assert close(
        steered,
        edited(model, add_bias(module, lambda layer: a * direction()[layer].double() / contribution.multiplier)),
    )
    assert not close(steered, torch.cat(model.run(IDS)))
    if family == "granite":
        assert not close(steered, edited(model, add_bias(module, lambda layer: a * direction()[layer].double())))


@pytest.mark.parametrize("family", [*LINEAR, *NORMED])
@pytest.mark.parametrize(("site", "module"), [("attn_raw", "attention_output"), ("mlp_raw", "mlp_output")])
def test_an_added_raw_vector_is_a_bias_on_every_family(family: str, site: str, module: str) -> None:
    model = built(family)
    add = Add(direction(), site, -0.4)
    expressible = coverage(Steering((add,)), model, "patch").rows[0].expressible
    assert expressible == CAN_BIAS[family][module == "mlp_output"], "only where a checkpoint can hold the bias"
    assert close(hooked(model, add), edited(model, add_bias(module, lambda layer: -0.4 * direction()[layer].double())))


@pytest.mark.parametrize("family", NORMED)
@pytest.mark.parametrize(("site", "module"), [("attn_out", "attention_output"), ("mlp_out", "mlp_output")])
def test_behind_a_norm_a_bias_does_something_else(family: str, site: str, module: str) -> None:
    model = built(family)
    add = Add(direction(), site, 0.7)
    assert not coverage(Steering((add,)), model, "patch").rows[0].expressible
    assert not close(
        hooked(model, add), edited(model, add_bias(module, lambda layer: 0.7 * direction()[layer].double()))
    )


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize(("site", "module"), [("attn_out", "attention_output"), ("mlp_out", "mlp_output")])
def test_a_projection_is_one_of_weight_and_bias(family: str, site: str, module: str) -> None:
    model = built(family)
    for w in (1.0, 0.3):
        project = ProjectOut(direction(), site, w)
        assert coverage(Steering((project,)), model, "patch").rows[0].expressible
        assert close(hooked(model, project), edited(model, out_of(module, w)))


@pytest.mark.parametrize("family", NORMED)
def test_behind_a_norm_a_projection_does_something_else_but_before_it_the_same(family: str) -> None:
    model = built(family)
    for site, same in (("attn_out", False), ("attn_raw", True), ("mlp_out", False), ("mlp_raw", True)):
        project = ProjectOut(direction(), site)
        module = "attention_output" if site.startswith("attn") else "mlp_output"
        assert coverage(Steering((project,)), model, "patch").rows[0].expressible == same
        assert close(hooked(model, project), edited(model, out_of(module, 1.0))) == same


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "granite", "olmo2", "qwen2", "gemma2"])
def test_the_first_residual_is_the_embedding_where_the_head_is_its_own(family: str) -> None:
    model = built(family)
    v = direction()[0].double()
    keep = torch.eye(48, dtype=torch.float64) - torch.outer(v, v) / (v @ v)

    def edit(other: SteerableModel) -> None:
        weight = other.places.embedding.weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight @ keep)

    project = ProjectOut(direction(), "resid_pre", layers=(0,))
    expressible = coverage(Steering((project,)), model, "patch").rows[0].expressible
    assert expressible == (not model.anatomy.tied)
    assert close(hooked(model, project), edited(model, edit)) == expressible


def test_a_projection_from_the_stream_is_not_one_from_every_writer() -> None:
    model = built("qwen3")
    everywhere = Direction(direction()[0].expand(4, 48), (0, 1, 2, 3), "resid_mid")
    writers = (
        ProjectOut(everywhere, "resid_pre", 0.5, layers=(0,)),
        ProjectOut(everywhere, "attn_out", 0.5),
        ProjectOut(everywhere, "mlp_out", 0.5),
    )
    assert not close(hooked(model, *writers), hooked(model, ProjectOut(everywhere, "resid_post", 0.5)))
