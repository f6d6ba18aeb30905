"""The proof at start on models of vLLM's shapes: what is right passes and leaves no trace; what is not is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer.backends.vllm import layers as in_layers
from steer.backends.vllm import routers, selfcheck
from steer.errors import SteerError
from tests.steer.backends.vllm import fakes

SITES = ("attn_out", "mlp_out", "resid_post")
EVERYWHERE = (("resid_pre", "add", 0), *((site, kind, layer) for site in SITES for kind in ("add", "project") for layer in range(fakes.LAYERS)))  # fmt: skip
ROUTED = tuple((site, kind, layer) for site, kind in (("router", "scale"), ("router_logits", "bias")) for layer in (0, 2))  # fmt: skip


def proven(style: str, places: Any = EVERYWHERE, known: bool = True, model: fakes.Model | None = None) -> Any:
    model = model or fakes.Model(style)
    tables = fakes.tables_of(places, style, known)
    layers = in_layers.decoder_layers(model, tables.declared)
    in_layers.install(layers, tables)
    rerouted = routers.install(layers, tables)
    selfcheck.prove(fakes.worker_of(model), model, layers, tables, rerouted)
    return model, tables


def clean(model: fakes.Model, tables: Any) -> bool:
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    zero = all(not bool(t.any()) for table in tables.at.values() for name, t in table.items() if name != "factors")
    ones = all(bool((table["factors"] == 1).all()) for table in tables.at.values() if "factors" in table)
    return not hooks and zero and ones and not bool(tables.code.any())


@pytest.mark.parametrize("style", ["fused", "normed", "scaled"])
def test_layers_that_add_what_their_blocks_return_pass(style: str) -> None:
    assert clean(*proven(style))


def test_a_multiplier_that_nobody_knows_is_refused_at_the_blocks_and_not_at_the_stream() -> None:
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(SteerError, match=rf"Layer 1 of vLLM's model was written to at {site}, and the stream"):
            proven("scaled", ((site, "add", 1),), known=False)
    proven("scaled", (("resid_post", "add", 1), ("resid_post", "project", 2)), known=False)


def test_a_norm_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SteerError, match="written to at attn_out"):
        proven("normed", (("attn_out", "add", 0),), known=False)


def test_a_layer_that_does_not_use_its_residual_is_refused() -> None:
    for layer in range(fakes.LAYERS):
        with pytest.raises(SteerError, match=r"divided differently between hidden_states and residual|the model's output stayed|does not add"):  # fmt: skip
            proven("forgetful", (("resid_post", "add", layer),))


def test_a_forward_past_the_class_is_refused() -> None:
    model = fakes.Model()
    model.model.layers[1].forward = model.model.layers[1].forward
    with pytest.raises(SteerError, match=r"layer 1 has a forward of its own.*offload"):
        proven("fused", (("resid_post", "add", 1),), model=model)


def test_a_part_or_a_list_of_layers_that_is_missing_is_refused() -> None:
    model = fakes.Model()
    del model.model.layers[2].mlp
    with pytest.raises(SteerError, match=r"Layer 2 .* has no mlp or block_sparse_moe"):
        proven("fused", (("mlp_out", "add", 2),), model=model)
    model = fakes.Model()
    del model.model.layers[2]
    with pytest.raises(SteerError, match=r"layers \(2\); expected one list of 3"):
        proven("fused", model=model)


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = fakes.Model()
    tables = fakes.tables_of((("resid_post", "add", 1),))
    layers = in_layers.decoder_layers(model, tables.declared)
    in_layers.install(layers, tables)
    worker = fakes.worker_of(model)
    worker.model_runner._dummy_run = lambda tokens, **options: None
    with pytest.raises(SteerError, match="Layer 1 of vLLM's model did not run"):
        selfcheck.prove(worker, model, layers, tables, {})


def test_what_a_write_moves_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that goes to every token, whichever it was meant for."""
    right = in_layers.change
    monkeypatch.setattr(in_layers, "change", lambda *args: right(*args).mean(0, keepdim=True).expand_as(args[0]))
    with pytest.raises(SteerError, match="was written to at"):
        proven("fused", (("resid_post", "add", 1),))


def test_nothing_declared_here_runs_nothing() -> None:
    model = fakes.Model()
    tables, worker = fakes.tables_of(()), fakes.worker_of(model)
    selfcheck.prove(worker, model, {}, tables, {})
    assert worker.model_runner.runs == 0


def grouped() -> fakes.GroupedTopKRouter:
    return fakes.GroupedTopKRouter(torch.linspace(-0.3, 0.4, fakes.EXPERTS))


@pytest.mark.parametrize("router", [fakes.FusedTopKRouter, lambda: fakes.FusedTopKRouter(True), grouped])
def test_routers_pass(router: Any) -> None:
    assert clean(*proven("fused", ROUTED + EVERYWHERE, model=fakes.Model(router=router)))


def test_a_kernel_that_ignores_or_replaces_its_router_is_refused() -> None:
    ignoring, alone = (fakes.Model(router=fakes.FusedTopKRouter, kernel=kernel) for kernel in ("ignores", "alone"))
    with pytest.raises(SteerError, match="The kernel of layer 0 of vLLM's model ignores the weights"):
        proven("fused", ROUTED, model=ignoring)
    with pytest.raises(SteerError, match="layer 0 run in one kernel that chooses by itself"):
        proven("fused", ROUTED, model=alone)
    with pytest.raises(SteerError, match="has 0 routers"):
        proven("fused", ROUTED)


class Simulated(fakes.FusedTopKRouter):
    """A router that nobody knows."""


def test_routers_whose_choice_is_not_that_of_their_logits_are_refused() -> None:
    with pytest.raises(SteerError, match="is a Simulated, which steering of experts does not know"):
        proven("fused", ROUTED, model=fakes.Model(router=Simulated))
    with pytest.raises(SteerError, match="chooses among 2 groups by their best expert"):
        proven("fused", ROUTED, model=fakes.Model(router=lambda: fakes.GroupedTopKRouter(None)))

    def hashed() -> fakes.FusedTopKRouter:
        router = fakes.FusedTopKRouter()
        router._hash_indices_table = torch.zeros(4, dtype=torch.int32)  # type: ignore[attr-defined]
        return router

    with pytest.raises(SteerError, match="BiasRouter does not know"):
        proven("fused", ROUTED, model=fakes.Model(router=hashed))
    proven("fused", ROUTED[:2], model=fakes.Model(router=hashed))

    class FusedTopKRouter(fakes.FusedTopKRouter):
        def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            bias = 1000.0 * torch.arange(fakes.EXPERTS)
            return super()._compute_routing(hidden_states, router_logits + bias, *args, **kwargs)

    with pytest.raises(SteerError, match="Forced choices do not hold"):
        proven("fused", ROUTED, model=fakes.Model(router=FusedTopKRouter))

    class GroupedTopKRouter(fakes.GroupedTopKRouter):
        def _compute_routing(self, *args: Any, **kwargs: Any) -> Any:
            weights, ids = super()._compute_routing(*args, **kwargs)
            return weights * 1.1, ids

    with pytest.raises(SteerError, match="chooses otherwise than by scores and selection bias"):
        proven("fused", ROUTED, model=fakes.Model(router=lambda: GroupedTopKRouter(torch.zeros(fakes.EXPERTS))))
