"""The outline by headers says of every family what `steer.coverage` says of real changes."""

from __future__ import annotations

import pytest
import torch

from steer import Add, Direction, ProjectOut, ScaleExperts, Steering, coverage
from steer.anatomy import read_headers, resolve
from steer.anatomy.forms import CHANGES, FORMS, OF_EXPERTS, PROJECTED, SCALED, reaches
from tests.tiny import FAMILIES


def change(kind, site, anatomy):
    if kind == SCALED:
        return Steering((ScaleExperts(tuple((layer, 1) for layer in anatomy.expert_layers), 2.0),))
    layers = tuple(range(anatomy.layers))
    d = Direction(
        torch.randn(len(layers), anatomy.hidden, generator=torch.Generator().manual_seed(0)), layers, "resid_mid"
    )
    heads = tuple((layer, 0) for layer in layers) if site == "head_out" else None
    return Steering((ProjectOut(d, site, heads=heads) if kind == PROJECTED else Add(d, site),))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_outline_agrees_with_coverage(tiny_folder, family, form):
    options = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    folder = tiny_folder(family, **options)
    headers = read_headers(folder)
    anatomy = resolve(headers.config, headers.shapes)
    outline = {row.change: row for row in reaches(anatomy) if row.form == form}
    assert (f"{SCALED} at router" in outline) == bool(anatomy.expert_layers)
    for kind, site in (*CHANGES, *(OF_EXPERTS if anatomy.expert_layers else ())):
        found = coverage(change(kind, site, anatomy), folder, form)
        row = outline[f"{kind} at {site}"]
        reached = sum(len(part.layers) for part in found.rows if part.expressible)
        if "no component" in row.why:  # The outline does not read biases.
            assert reached <= row.layers
            continue
        assert row.layers == reached, (kind, site)
        assert row.total == anatomy.layers
        assert all(part.expressible == (part.refused is None) for part in found.rows), (kind, site)
        assert bool(row.why) == (row.layers < row.total)


def test_a_quantised_checkpoint_cannot_be_patched(tiny_folder):
    headers = read_headers(tiny_folder("qwen3"))
    rows = reaches(resolve(headers.config, headers.shapes), "fp8")
    assert {row.layers for row in rows if row.form == "patch"} == {0}
    assert all("fp8" in row.why for row in rows if row.form == "patch")
    assert {row.layers for row in rows if row.form == "hook"} == {4}


def test_output_biases_are_a_condition_of_adapters(tiny_folder):
    headers = read_headers(tiny_folder("llama", attention_bias=True, mlp_bias=False))
    rows = {(row.change, row.form): row for row in reaches(resolve(headers.config, headers.shapes))}
    assert "bias" in rows["ProjectOut at attn_out", "lora"].why and not rows["ProjectOut at mlp_out", "lora"].why


def test_packed_experts_take_up_no_vector(tiny_folder):
    """MXFP4 without a word of it in config.json."""
    headers = read_headers(tiny_folder("gpt_oss"))
    packed = {f"{name}_blocks" if name.endswith("_proj") else name: shape for name, shape in headers.shapes.items()}
    anatomy = resolve(headers.config, packed)
    rows = {(row.change, row.form): row for row in reaches(anatomy)}
    assert anatomy.experts == 0 and rows["Add at mlp_out", "patch"].layers == 0
    assert "neither" in rows["Add at mlp_out", "patch"].why
