"""Reads: against `output_hidden_states`, the naive rewrite, and themselves under batches, padding and a KV cache."""

from __future__ import annotations

import pytest
import torch

import steer
from steer import Add, Direction, ProjectOut, SteerError, Steering
from tests.steer import naive
from tests.tiny import FAMILIES

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3]])
EVERYWHERE = dict.fromkeys(naive.SITES)


@torch.no_grad()
def forward(hf, ids=IDS, **options):
    return hf(input_ids=ids, use_cache=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_streams_agree_with_output_hidden_states(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    with model.capture({"resid_pre": None, "resid_post": None}) as acts:
        hidden = forward(hf, output_hidden_states=True).hidden_states
    for layer in range(4):
        torch.testing.assert_close(acts["resid_pre"][layer], hidden[layer], rtol=1e-5, atol=1e-5)
    for layer in range(3):
        torch.testing.assert_close(acts["resid_post"][layer], hidden[layer + 1], rtol=1e-5, atol=1e-5)
    # transformers gives its last entry after the final norm; ours is the stream itself.
    torch.testing.assert_close(hf.model.norm(acts["resid_post"][3]), hidden[4], rtol=1e-5, atol=1e-5)
    assert (acts["resid_post"][3] - hidden[4]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_agrees_with_the_naive_rewrite(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    with model.capture(EVERYWHERE) as acts:
        forward(hf)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    with naive.rewritten(hf, {}, seen):
        forward(hf)
    found = {(layer, site): value for site, values in acts.items() for layer, value in values.items()}
    missing = {(layer, "z") for layer in range(4) if layer not in model.anatomy.site_layers("z")}
    assert found.keys() == seen.keys() - missing
    seen = {place: value for place, value in seen.items() if place in found}
    for place, value in seen.items():
        torch.testing.assert_close(found[place], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=str(place))


@pytest.mark.parametrize("family", FAMILIES)
def test_z_has_the_true_head_width(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    layer = model.anatomy.site_layers("z")[-1]
    with model.capture({"z": [layer]}) as acts:
        forward(hf)
    width = model.anatomy.head_width
    assert acts["z"][layer].shape == (2, 7, 4, width)
    assert width * 4 == model.parameter("attention_output", layer).shape[1]
    if family in ("mistral", "qwen3", "gemma2", "gemma3_text", "qwen3_moe"):
        assert width != model.anatomy.hidden // model.anatomy.heads


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_reads_the_same_alone_in_a_batch_and_padded(tiny, family):
    hf, tokenizer = tiny(family)
    model = steer.wrap(hf, tokenizer)
    d = Direction(torch.randn(2, 48, generator=torch.Generator().manual_seed(1)), (1, 2), "resid_post")
    steering = Steering((Add(d, "resid_post"), ProjectOut(d, "attn_out", phase="generated")))
    sequences, prompts = [[3, 14, 15, 9, 26, 5, 35], [8, 9, 7], [4, 4, 30, 31, 32]], [4, 2, 3]
    with model.steered(steering), model.capture(EVERYWHERE) as together:
        logits = model.run(sequences, prompts)
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        with model.steered(steering), model.capture(EVERYWHERE) as alone:
            single = model.run([sequence], [prompt])[0]
        torch.testing.assert_close(logits[row], single, rtol=1e-5, atol=2e-5)
        for site, values in alone.items():
            for layer, value in values.items():
                padded = together[site][layer][row, : len(sequence)]
                torch.testing.assert_close(padded, value[0], rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_cache_and_left_padding_reads_what_one_forward_reads(tiny, family, dtype):
    hf, tokenizer = tiny(family, dtype=dtype)
    model = steer.wrap(hf, tokenizer)
    d = Direction(torch.randn(2, 48, generator=torch.Generator().manual_seed(1)), (1, 2), "resid_post")
    at = model.anatomy.site_layers("z")[-1]
    heads = ((1, 0), (2, 1)) if 2 in model.anatomy.site_layers("head_out") else ((1, 0), (1, 1))
    steering = Steering(
        (
            Add(d, "resid_post", coefficient=0.5),
            ProjectOut(d, "resid_mid"),
            ProjectOut(d, "head_out", heads=heads),
        )
    )
    ids = torch.tensor([[0, 0, 8, 9, 7], [3, 14, 15, 9, 26]])
    mask = (torch.arange(5) >= torch.tensor([[2], [0]])).long()
    with model.steered(steering) as report, model.capture({"resid_post": None, "z": [at]}, every=True) as acts:
        out = hf.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert [passed["resid_post"][0].shape[1] for passed in acts.forwards] == [5, 1, 1, 1, 1]
    assert report.touched[1, "resid_post"] == {"all": 8 + 2 * 4}  # Padding is not counted.
    if dtype == torch.bfloat16:
        return
    for row, start in ((0, 2), (1, 0)):
        with model.steered(steering), model.capture({"resid_post": None, "z": [at]}) as whole:
            model.run([out[row, start:-1].tolist()])
        for site, values in whole.items():
            for layer, value in values.items():
                cached = torch.cat([passed[site][layer][row] for passed in acts.forwards])[start:]
                torch.testing.assert_close(cached, value[0], rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_readers_get_states_and_are_called_in_forward_order(tiny, family):
    model = steer.wrap(*tiny(family))
    calls, states_seen = [], []

    def note(site, layer, value, states):
        calls.append((layer, site))
        states_seen.append(states)

    with model.read(note, EVERYWHERE):
        model.run([[5, 14, 6, 9, 26], [3, 3, 5]], [2, 3])
        assert calls == sorted(calls, key=lambda place: (place[0], naive.SITES.index(place[1])))
        assert len(calls) == 4 * len(naive.SITES)
        # <think> is 5 and </think> is 6 in the tiny vocabulary; marks in raw prompts count.
        assert states_seen[0].tolist() == [[0, 2, 3, 3, 3], [0, 0, 2, -1, -1]]
        states_seen.clear()
        model.run([[5, 14, 6]])
        assert states_seen[0] is None


def test_mlp_raw_exists_on_dense_layers_only(tiny):
    model = steer.wrap(*tiny("qwen3_moe"))
    with model.capture({"mlp_raw": None, "mlp_out": None}) as acts:
        forward(model.hf)
    assert sorted(acts["mlp_raw"]) == [0, 2] and sorted(acts["mlp_out"]) == [0, 1, 2, 3]
    torch.testing.assert_close(acts["mlp_raw"][0], acts["mlp_out"][0], rtol=0, atol=0)
    with pytest.raises(SteerError, match=r"experts.*layers \[0, 2\].*mlp_out"), model.capture({"mlp_raw": [1]}):
        pass
    d = Direction(torch.ones(1, 48), (1,), "mlp_raw")
    with pytest.raises(SteerError, match="experts"), model.steered(Steering((Add(d, "mlp_raw"),))):
        pass


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"resid_between": [0]}, "no site"),
        ({"z": [4]}, "layer 4"),
        ({"z": [-1]}, "layer -1"),
        ({"head_out": None}, "head scores"),
    ],
)
def test_reading_what_is_not_there_is_refused(tiny, wanted, words):
    model = steer.wrap(*tiny("llama"))
    with pytest.raises(SteerError, match=words), model.capture(wanted):
        pass


def test_capture_keeps_the_graph(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    with model.capture({"resid_mid": [1]}) as acts:
        loss = hf(input_ids=IDS, use_cache=False).logits.sum()
    (gradient,) = torch.autograd.grad(loss, acts["resid_mid"][1])
    assert gradient.abs().sum() > 0


def test_embeddings_as_input_work_without_phases_and_are_refused_with_them(tiny):
    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    d = Direction(torch.ones(1, 48), (1,), "resid_post")
    embedded = hf.model.embed_tokens(IDS)
    with model.steered(Steering((Add(d, "resid_post"),))) as report:
        by_embedding = hf(inputs_embeds=embedded).logits
        torch.testing.assert_close(by_embedding, hf(input_ids=IDS).logits)
    assert report.touched[1, "resid_post"] == {"all": 28}
