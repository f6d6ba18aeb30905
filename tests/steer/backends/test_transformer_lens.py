"""Our hooks against TransformerLens 4.3, an independent code base: reads and writes in float32 to 1e-5."""

from __future__ import annotations

import copy

import pytest
import torch

import steer
from steer import Add, BiasRouter, Custom, Direction, ProjectOut, ScaleExperts, SetComponent, SteerError, Steering
from steer.backends import transformer_lens as lens
from tests.tiny import FAMILIES

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3]])
LAYERS = (0, 2)


def close(found, expected, what=""):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda text: f"{what}: {text}")


def read_there(family, site):
    """What the bridge does not read: no attention hooks on linear attention, and DeepSeek's z split by another width."""
    linear = family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") and site in ("z", "attn_out")
    return not linear and (family, site) not in (("deepseek_v3", "z"), ("gemma4_text", "z"))


def both(tiny, family):
    hf, tokenizer = tiny(family)
    hf.set_attn_implementation("eager")  # As the bridge; transformers' sdpa leaves out Gemma 2's softcapping.
    return steer.wrap(hf, tokenizer), lens.wrap(hf)


def direction(model, site, seed=0):
    width = (model.anatomy.heads, model.anatomy.head_width) if site == "z" else (model.anatomy.hidden,)
    return Direction(torch.randn(len(LAYERS), *width, generator=torch.Generator().manual_seed(seed)), LAYERS, site)


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_agree(tiny, family):
    model, theirs = both(tiny, family)
    wanted = {site: range(model.anatomy.layers) for site in lens.HOOKS if read_there(family, site)}
    with torch.no_grad(), model.capture(wanted) as acts:
        ours = model.hf(input_ids=IDS, use_cache=False).logits
    logits, read = theirs.run(IDS, wanted=wanted)
    close(ours, logits, "logits")
    for site in wanted:
        for layer in wanted[site]:
            close(acts[site][layer], read[site][layer], f"{site} of layer {layer}")


@pytest.mark.oracle
@pytest.mark.parametrize("site", lens.WRITABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_writes_agree(tiny, family, site):
    if not read_there(family, site):
        return
    model, theirs = both(tiny, family)
    d = direction(model, site)
    with torch.no_grad():
        plain = model.hf(input_ids=IDS, use_cache=False).logits
    for steering in (
        Steering((Add(d, site, coefficient=0.8),)),
        Steering((ProjectOut(d, site, weight=0.7), SetComponent(direction(model, site, 1), site, 1.2))),
        Steering((Custom(lambda h, layer: h.sin() - h * layer / 5, site, LAYERS),)),
    ):
        with torch.no_grad(), model.steered(steering):
            ours = model.hf(input_ids=IDS, use_cache=False).logits
        logits, _ = theirs.run(IDS, steering)
        close(ours, logits)
        assert (ours - plain).abs().max() > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_writes_at_several_sites_with_reads_after_them_agree(tiny, family):
    model, theirs = both(tiny, family)
    steering = Steering(
        (
            Add(direction(model, "z"), "z", coefficient=0.5),
            ProjectOut(direction(model, "resid_post"), "attn_out"),
            Add(direction(model, "mlp_out", 2), "mlp_out"),
            Add(direction(model, "resid_post", 3), "resid_post", coefficient=-0.5),
        )
    )
    wanted = dict.fromkeys(("z", "attn_out", "resid_mid", "mlp_out", "resid_post"), LAYERS)
    with torch.no_grad(), model.steered(steering, 0.6), model.capture(wanted) as acts:
        ours = model.hf(input_ids=IDS, use_cache=False).logits
    logits, read = theirs.run(IDS, steering, 0.6, wanted)
    close(ours, logits)
    for site in wanted:
        for layer in LAYERS:
            close(acts[site][layer], read[site][layer], f"{site} of layer {layer}")


@pytest.mark.oracle
def test_their_write_at_resid_mid_misses_the_skip_path(tiny):
    """Why `resid_mid` is read only in the adapter; if this fails, TransformerLens has been repaired."""
    model, theirs = both(tiny, "llama")
    d = direction(model, "resid_mid")
    with torch.no_grad(), model.steered(Steering((Add(d, "resid_mid"),))):
        ours = model.hf(input_ids=IDS, use_cache=False).logits
    hooks = [(f"blocks.{layer}.hook_resid_mid", lambda value, hook, layer=layer: value + d[layer]) for layer in LAYERS]
    with torch.no_grad(), theirs.bridge.hooks(fwd_hooks=hooks):
        logits = theirs.bridge(IDS)
    assert (ours - logits).abs().max() > 0.1


@pytest.mark.oracle
def test_the_model_itself_is_not_touched(tiny):
    hf, _ = tiny("qwen3")
    before = copy.deepcopy(hf.state_dict())
    names = [name for name, _ in hf.named_modules()]
    lens.wrap(hf)
    assert [name for name, _ in hf.named_modules()] == names and hf.config._attn_implementation != "eager"
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


@pytest.mark.parametrize(
    ("intervention", "words"),
    [
        (lambda d: Add(d, "resid_mid"), "resid_mid"),
        (lambda d: Add(d, "attn_raw"), "attn_raw"),
        (lambda d: ProjectOut(d, "head_out", heads=((0, 1),)), "head_out"),
        (lambda d: Add(d, "resid_post", phase="thinking"), "thinking"),
        (lambda d: ScaleExperts(((0, 1),), 2.0), "cannot write router"),
        (lambda d: BiasRouter(force_in=((0, 1),)), "cannot write router_logits"),
    ],
)
def test_what_the_bridge_cannot_do_is_refused_before_it_runs(intervention, words):
    d = Direction(torch.ones(1, 8), (0,), "resid_post")
    with pytest.raises(SteerError, match=words):
        lens.Lens(bridge=None).run(IDS, Steering((intervention(d),)))


def test_reading_a_site_without_a_hook_is_refused():
    with pytest.raises(SteerError, match="mlp_raw"):
        lens.Lens(bridge=None).run(IDS, wanted={"mlp_raw": [0]})
