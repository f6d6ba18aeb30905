"""Router counts against choices made by hand: scores in numpy float64 from what each router reads, padding by nobody."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import probes
from probes.collect.recorders import Batch
from probes.collect.routing import RouterCounts
from steer import BiasRouter, ScaleExperts, Steering
from steer.errors import SteerError
from steer.traces import Traces
from tests import tiny
from tests.probes import made, naive

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "qwen3_next")
SPANS = ("all", "thinking", "answer", "marker:;")


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


def chosen(family: str, router: torch.nn.Module, states: np.ndarray, config) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Return (token, chosen) ids and weights, as the family's paper or report has it."""
    top = config.num_experts_per_tok
    logits = states @ router.weight.detach().double().numpy().T
    if family in ("gpt_oss", "granitemoe"):  # A softmax over the chosen ones.
        if family == "gpt_oss":
            logits = logits + router.bias.detach().double().numpy()
        ids = best(logits, top)
        return ids, softmax(np.take_along_axis(logits, ids, -1))
    if family == "deepseek_v3":  # Sigmoid scores; a bias that only chooses; the best group by its two best; scaled.
        scores = 1 / (1 + np.exp(-logits))
        biased = scores + router.e_score_correction_bias.double().numpy()
        groups = biased.reshape(len(biased), config.n_group, -1)
        kept = best(np.sort(groups, -1)[..., -2:].sum(-1), config.topk_group)
        open_ = np.zeros(groups.shape[:2], dtype=bool)
        np.put_along_axis(open_, kept, True, -1)
        ids = best(np.where(open_[..., None], groups, 0.0).reshape(biased.shape), top)
        weights = np.take_along_axis(scores, ids, -1)
        weights = weights / weights.sum(-1, keepdims=True) if config.norm_topk_prob else weights
        return ids, weights * config.routed_scaling_factor
    scores = softmax(logits)
    ids = best(scores, top)
    weights = np.take_along_axis(scores, ids, -1)
    renormalised = family == "mixtral" or config.norm_topk_prob
    return ids, weights / weights.sum(-1, keepdims=True) if renormalised else weights


def read_by_routers(hf, tokens: list[int]) -> dict[int, tuple[torch.nn.Module, np.ndarray]]:  # type: ignore[no-untyped-def]
    """Return layer -> its router and the (token, hidden) that it reads."""
    found, handles = {}, []
    for number, layer in enumerate(hf.model.layers):
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if router is None:
            continue

        def keep(module, args, number=number):  # type: ignore[no-untyped-def]
            found[number] = (module, args[0].reshape(-1, args[0].shape[-1]).detach().numpy().copy())

        handles.append(router.register_forward_pre_hook(keep))
    with torch.no_grad():
        hf(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_weights_equal_the_naive_ones(family: str) -> None:
    run = made.traces(4)
    hf = tiny.build(family, dtype=torch.float64).model
    hf.set_experts_implementation("eager")  # The grouped kernel knows no float64.
    summaries = [
        probes.collect(made.model(family), order, recorders=[RouterCounts(SPANS)], batch_tokens=batch_tokens)
        for order, batch_tokens in ((run, 90), (Traces(list(run)[::-1], run.meta), 1), (run, 10_000))
    ]
    for trace in run:
        tokens = list(trace.tokens)
        read = read_by_routers(hf, tokens)
        for span in SPANS:
            places = (
                list(range(len(tokens)))
                if span == "all"
                else naive.positions(tokens, trace.prompt_length, span, made.THINK, made.CLOSE, made.SEMICOLON)
            )
            count, weight = np.zeros((len(read), 4)), np.zeros((len(read), 4))
            for index, (router, states) in enumerate(read.values()):
                ids, weights = chosen(family, router, states, hf.config)
                for place in places:
                    for expert, value in zip(ids[place], weights[place], strict=True):
                        count[index, expert] += 1
                        weight[index, expert] += value
            for summary in summaries:
                row = [row.id for row in summary.rows].index(trace.id)
                assert summary.quantities[f"router.count/{span}"].layers == tuple(read)
                np.testing.assert_array_equal(summary.values(f"router.count/{span}")[row].numpy(), count)
                np.testing.assert_allclose(summary.values(f"router.weight/{span}")[row].numpy(), weight, atol=1e-4)


def test_counts_give_what_rice_needs() -> None:
    """T from K over all tokens, M from k at a marker; counts of groups add up."""
    model, run = made.model("qwen3_moe"), made.traces(6)
    summary = probes.collect(model, run, recorders=[RouterCounts(SPANS)])
    per_token = model.hf.config.num_experts_per_tok
    count = summary.values("router.count/all")
    assert (
        count.sum(-1)
        == per_token * torch.tensor([len({t.id: t for t in run}[row.id].tokens) for row in summary.rows])[:, None]
    ).all()
    marked = summary.values("router.count/marker:;").sum(-1) / per_token
    assert (marked == torch.tensor([row.positions["marker:;"] for row in summary.rows])[:, None]).all()
    groups = probes.collect(model, run, recorders=[RouterCounts(SPANS)], keep="group")
    assert torch.equal(groups.values("router.count/all").sum(0), count.sum(0))


def test_traces_without_a_named_span_count_in_all() -> None:
    run = made.traces(3)
    silent = replace(run[0], id="silent/0", thinking_span=None, closed=None, thinking_tokens=None)
    summary = probes.collect(made.model("olmoe"), [*run, silent], recorders=[RouterCounts(("all", "thinking"))])
    row = [row.id for row in summary.rows].index("silent/0")
    assert not summary.values("router.count/thinking")[row].any()
    assert summary.values("router.count/all")[row].any()


def test_layers_narrow_to_those_with_experts() -> None:
    model, run = made.model("qwen3_moe"), made.traces(2)
    part = probes.collect(model, run, recorders=[RouterCounts()], layers=[2, 3])
    whole = probes.collect(model, run, recorders=[RouterCounts()])
    assert part.quantities["router.count/all"].layers == (3,)
    assert torch.equal(part.values("router.count/all"), whole.values("router.count/all", (3,)))


@pytest.mark.parametrize(("family", "layers"), [("llama", (0, 1)), ("qwen3_moe", (0, 2))])
def test_models_without_experts_are_refused_by_name(family: str, layers: tuple[int, ...]) -> None:
    with pytest.raises(SteerError, match=f"tiny {family}.*no experts"):
        RouterCounts().prepare(made.model(family), layers)


def test_nothing_is_left_on_the_model_also_when_the_pass_fails() -> None:
    model, run = made.model("mixtral"), made.traces(2)
    broken = model.places.layers[2].before_mlp.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probes.collect(model, run, recorders=[RouterCounts()])
    broken.remove()
    probes.collect(model, run, recorders=[RouterCounts()])
    assert not [name for name, module in model.hf.named_modules() if module._forward_hooks]


def test_a_router_that_is_never_called_is_an_error() -> None:
    model, run = made.model("mixtral"), made.traces(1)
    block = model.hf.model.layers[1].mlp
    block.forward = torch.nn.Identity().forward
    with pytest.raises(SteerError, match=r"(?i)the router of layer 1 was not called"):
        probes.collect(model, run, recorders=[RouterCounts()])


def test_what_is_counted_is_what_the_blocks_see() -> None:
    """Whichever context was opened first: forced experts count where they are forced, and scaled weights scaled."""
    model, run = made.model("qwen3_moe"), made.traces(4)
    forcing = Steering((BiasRouter(force_in=((1, 2),)), ScaleExperts(((3, 0),), 4.0)))
    recorder = RouterCounts(("all",))
    plain = probes.collect(model, run, recorders=[recorder])
    views = [probes.collect(model.with_(forcing), run, recorders=[recorder])]
    with model.steered(forcing):
        views.append(probes.collect(model, run, recorders=[recorder]))
    batch, prepared = Batch(tuple(run), {}), recorder.prepare(model, (1, 3))
    one = prepared.start(batch)
    assert prepared.within is not None
    with prepared.within(one), model.steered(forcing):  # The listener is there before the steering.
        final = model.run([trace.tokens for trace in batch.traces], head=False)
    late = one.rows(final)
    for summary in views:
        count, weight = summary.values("router.count/all"), summary.values("router.weight/all")
        lengths = torch.tensor([len({t.id: t for t in run}[row.id].tokens) for row in summary.rows])
        assert torch.equal(count[:, 0, 2], lengths.to(count.dtype))
        assert (plain.values("router.count/all")[:, 0, 2] < lengths).all()
        mean = weight[:, 1, 0].sum() / count[:, 1, 0].sum()
        assert mean > 1, "four times a share of a sum that is 1"
        rows = {row.id: index for index, row in enumerate(summary.rows)}
        for index, trace in enumerate(batch.traces):
            assert torch.equal(torch.as_tensor(late["router.count/all"][index]), count[rows[trace.id]])


def test_counts_are_exact_whatever_the_default_number() -> None:
    model, run = made.model("qwen3_moe"), made.traces(6)
    expected = probes.collect(model, run, recorders=[RouterCounts()])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = probes.collect(model, run, recorders=[RouterCounts()])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.values("router.count/all"), expected.values("router.count/all"))
