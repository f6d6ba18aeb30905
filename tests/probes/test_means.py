"""Recorders against an oracle that stores everything, on families of all three kinds of contribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probes
from probes.collect.means import HeadMeans, SpanMeans
from steer.errors import SteerError
from steer.traces import Traces
from tests import tiny
from tests.probes import made, naive

FAMILIES = ("llama", "qwen3", "phi3", "granite", "gemma2", "gemma3_text", "olmo2")
SPANS = ("predicts_thinking", "thinking", "last_prompt_token", "answer", "marker:;")
SITES = ("resid_pre", "resid_mid", "resid_post", "z", "attn_raw", "attn_out", "mlp_raw")


def oracle(family: str, run: Traces, site: str, span: str) -> dict[str, np.ndarray | None]:
    """Return id -> (layer, width) in float64 from a float64 copy of the model; None where the span is empty."""
    hf = tiny.build(family, dtype=torch.float64).model
    found: dict[str, np.ndarray | None] = {}
    for trace in run:
        tokens = list(trace.tokens)
        places = naive.positions(tokens, trace.prompt_length, span, made.THINK, made.CLOSE, made.SEMICOLON)
        values = naive.activations(hf, family, tokens)[site]
        found[trace.id] = values[:, places].mean(1) if places else None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_means_equal_the_naive_ones(family: str) -> None:
    run = made.traces(5)
    summary = probes.collect(made.model(family), run, sites=SITES, spans=SPANS, batch_tokens=90)
    for site in SITES:
        for span in SPANS:
            expected = oracle(family, run, site, span)
            values = summary.values(f"{site}/{span}").flatten(2)
            for row, value in zip(summary.rows, values, strict=True):
                wanted = expected[row.id]
                if wanted is None:
                    assert row.positions[span] == 0
                    assert not value.any()
                else:
                    scale = np.abs(wanted).max()
                    np.testing.assert_allclose(
                        value.numpy(), wanted, atol=1e-5 * scale, rtol=0, err_msg=f"{site} {span}"
                    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_z_over_rms_equals_the_naive_one(family: str) -> None:
    run = made.traces(4)
    model = made.model(family)
    summary = probes.collect(model, run, sites=("z",), spans=("thinking",))
    hf = tiny.build(family, dtype=torch.float64).model
    epsilon = model.hf.config.rms_norm_eps
    for row, value in zip(summary.rows, summary.values("z_over_rms/thinking").flatten(2), strict=True):
        trace = next(trace for trace in run if trace.id == row.id)
        tokens = list(trace.tokens)
        kept = naive.activations(hf, family, tokens)
        places = naive.positions(tokens, trace.prompt_length, "thinking", made.THINK, made.CLOSE, made.SEMICOLON)
        wanted = naive.over_rms(kept["z"], kept["attn_raw"], epsilon)[:, places].mean(1)
        np.testing.assert_allclose(value.numpy(), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_only_norm_families_keep_z_over_rms(family: str) -> None:
    assert set(HeadMeans(("thinking",)).prepare(made.model(family), (0, 1)).keeps) == {"z/thinking"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_padded_batches_equal_batches_of_one(family: str) -> None:
    run, model = made.traces(6), made.model(family)
    one = probes.collect(model, run, batch_tokens=1)
    many = probes.collect(model, run, batch_tokens=10_000)
    for name in one.quantities:
        a, b = one.values(name), many.values(name)
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_layers_narrow_what_is_kept_and_keep_its_numbers() -> None:
    run, model = made.traces(3), made.model()
    whole, part = probes.collect(model, run), probes.collect(model, run, layers=[3, 1])
    assert part.layers == (1, 3)
    for name in part.quantities:
        assert torch.equal(part.values(name), whole.values(name, (1, 3)))


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_narrow_dtypes_cost_one_rounding(dtype: str, error: float) -> None:
    run, model = made.traces(3), made.model()
    exact = probes.collect(model, run, sites=("resid_mid",)).values("resid_mid/predicts_thinking")
    narrow = probes.collect(model, run, sites=("resid_mid",), dtype=dtype)
    assert narrow.shards[0].tensor("resid_mid/predicts_thinking").dtype == getattr(torch, dtype)
    assert ((narrow.values("resid_mid/predicts_thinking") - exact).abs() <= error * exact.abs() + 1e-7).all()


def test_what_overflows_a_narrow_dtype_is_refused() -> None:
    model = made.model()
    with torch.no_grad():
        model.places.embedding.weight.mul_(1e6)
    with pytest.raises(SteerError, match="float16"):
        probes.collect(model, made.traces(3), sites=("resid_mid",), dtype="float16")


def test_bfloat16_models_are_averaged_in_float32() -> None:
    model, run = made.model("llama", dtype=torch.bfloat16), made.traces(4, longest=200)
    summary = probes.collect(model, run, sites=("resid_mid",), spans=("thinking",), batch_tokens=1)
    hf = model.hf
    for row, value in zip(summary.rows, summary.values("resid_mid/thinking"), strict=True):
        trace = next(trace for trace in run if trace.id == row.id)
        tokens = list(trace.tokens)
        places = naive.positions(tokens, trace.prompt_length, "thinking", made.THINK, made.CLOSE, made.SEMICOLON)
        wanted = naive.activations(hf, "llama", tokens)["resid_mid"][:, places].mean(1)
        np.testing.assert_allclose(value.numpy(), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_experts_leave_mlp_raw_to_the_dense_layers() -> None:
    summary = probes.collect(made.model("qwen3_moe"), made.traces(2), sites=("mlp_raw", "mlp_out"))
    assert summary.quantities["mlp_raw/predicts_thinking"].layers == (0, 2)
    assert summary.quantities["mlp_out/predicts_thinking"].layers == (0, 1, 2, 3)


def test_a_view_is_read_with_its_changes() -> None:
    model, run = made.model(), made.traces(3)
    plain = probes.collect(model, run, sites=("resid_post",))
    push = steering(plain)
    changed = probes.collect(model.with_(push), run, sites=("resid_post",))
    name = "resid_post/predicts_thinking"
    difference = (changed.values(name, (1,)) - plain.values(name, (1,)))[:, 0]
    expected = push.interventions[0].direction[1].double().expand_as(difference)
    assert torch.allclose(difference, expected, atol=1e-4)
    assert plain.meta["changes"] == []
    assert len(changed.meta["changes"]) == 1


def steering(summary: probes.Summary):  # type: ignore[no-untyped-def]
    """Return a steering that adds an arbitrary vector after layer 1."""
    from steer import Add, Direction, Steering

    vectors = torch.linspace(-1, 1, 48).repeat(1, 1)
    return Steering((Add(Direction(vectors, (1,), "resid_post", summary.model), "resid_post"),), summary.model, "push")


def test_unknown_sites_and_spans_are_refused() -> None:
    with pytest.raises(SteerError, match="no site 'resid'"):
        SpanMeans(("resid",))
    with pytest.raises(SteerError, match="no vector per token"):
        SpanMeans(("head_out",))
    with pytest.raises(SteerError, match="no span 'thoughts'"):
        SpanMeans(("z",), ("thoughts",))


def test_a_site_that_no_layer_has_is_refused_and_not_left_empty() -> None:
    some, none = made.model("qwen3_moe"), made.model("mixtral")
    assert probes.collect(some, made.traces(2), sites=("mlp_raw",)).kept("mlp_raw/predicts_thinking").layers == (0, 2)
    with pytest.raises(SteerError, match=r"None of the layers .* of this mixtral model has mlp_raw"):
        probes.collect(none, made.traces(2), sites=("mlp_raw", "resid_mid"))
