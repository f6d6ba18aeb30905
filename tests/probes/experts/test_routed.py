"""Routed ids of an engine, counted as `collect` counts those of a model that runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import probes
from probes.experts import expert_scores, from_routed, recorder_for
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.traces import Traces
from tests import tiny
from tests.probes import made
from tests.probes.experts.synthetic import Ids, routed, summary, traces

MARKERS = {"<think>": 1.0, "</think>": -1.0, ";": -1.0}


def reported(model: SteerableModel, run: Traces) -> list[Ids]:
    """What an engine would report: the ids that each router returns, trace by trace."""
    rows: list[Ids] = []

    def keep(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        (ids,) = (part for part in output if not part.is_floating_point())
        rows.append(ids.reshape(-1, ids.shape[-1]).numpy())

    experts = model.anatomy.record.experts
    assert experts is not None
    layers = [model.places.layers[layer].layer for layer in model.anatomy.expert_layers]
    handles = [layer.get_submodule(experts.router).register_forward_hook(keep) for layer in layers]
    found = []
    for trace in run:
        rows.clear()
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([trace.tokens]), use_cache=False)
        found.append(np.stack(rows, axis=1))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_counts_and_scores_are_those_of_collect(family: str, tmp_path: Path) -> None:
    model, run = made.model(family), made.traces(40, longest=12)
    here = probes.collect(model, run, recorders=[recorder_for(MARKERS)])
    there = from_routed(
        run, reported(model, run), model.anatomy.expert_layers, experts=4, tokenizer=model.tokenizer, model=model.identity,
        markers=MARKERS, out=tmp_path / "s",
    )  # fmt: skip
    again = probes.Summary.load(tmp_path / "s")
    assert len(again.shards) == len(here.shards) == 2
    for name in there.quantities:
        for made_of_ids in (there, again):
            assert torch.equal(made_of_ids.values(name), here.values(name)), name
            assert made_of_ids.quantities[name].layers == here.quantities[name].layers
    assert again.rows == here.rows
    for key in ("hash", "given", "read", "tokens", "unclosed", "truncated"):
        assert again.meta["traces"][key] == here.meta["traces"][key]
    assert expert_scores(again, MARKERS, resamples=20, model=model) == expert_scores(
        here, MARKERS, resamples=20, model=model
    )


def test_a_last_token_that_was_never_read_is_not_counted() -> None:
    """The markers are the reply's last tokens: with one row less, one `</think>` and every `<eos>` are gone."""
    given = traces(0)
    given[0] = made.trace("q00", 0, [20, 21], closed=False)
    given[1] = made.trace("q01", 0, [20, made.CLOSE], closed=False)
    ids = routed(given, 0)
    markers = {"<think>": 1.0, "</think>": -1.0}
    whole, shorter = summary(given, ids, markers), summary(given, [each[:-1] for each in ids], markers)
    assert whole.meta["traces"]["tokens"] - shorter.meta["traces"]["tokens"] == len(given)
    marked = [sum(row.positions["marker:</think>@all"] for row in each.rows) for each in (whole, shorter)]
    assert marked == [len(given) - 1, len(given) - 2]
    for name in whole.quantities:
        lost = whole.values(name).sum() - shorter.values(name).sum()
        assert lost == {"all": 4 * len(given), "marker:<think>@all": 0, "marker:</think>@all": 4}[name.split("/", 1)[1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids[:-2], r"has shape \(\d+, 2, 2\).*tokens, 2 layers"),
        (lambda ids: ids[:, :1], "1, 2.*2 layers"),
        (lambda ids: ids[..., 0], "shape"),
        (lambda ids: ids + 15, "0 to 15"),
        (lambda ids: ids - 99, "0 to 15.*logical ids"),
        (lambda ids: ids.astype(float), "whole numbers"),
        (lambda ids: ids * 0, "twice"),
    ],
)
def test_arrays_of_another_kind_are_refused(change, words: str) -> None:  # type: ignore[no-untyped-def]
    given = traces(0)
    ids = routed(given, 0)
    ids[3] = change(ids[3])
    words = words.replace("has shape", "have shape")
    with pytest.raises(SteerError, match=f"(?s){words}"):
        summary(given, ids, {"<think>": 1.0})


def test_every_trace_needs_its_array(tmp_path: Path) -> None:
    given = traces(0)
    ids = routed(given, 0)
    for few, arrays in ((given, ids[1:]), ([], [])):
        with pytest.raises(SteerError, match="one array per trace"):
            summary(few, arrays, {"<think>": 1.0})
    (tmp_path / "s").mkdir()
    with pytest.raises(SteerError, match="exists already"):
        from_routed(given, ids, (1, 3), experts=16, tokenizer=tiny.tokenizer(), model=made.identity(), markers={"so": 1}, out=tmp_path / "s")  # fmt: skip


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    """One trace that chose one expert a token and one that chose three would pass for two that chose two."""
    given = [replace(trace, id=str(at)) for at, trace in enumerate(traces(0)[:1] * 2)]
    [ids] = routed(given[:1], 0, chosen=3)
    with pytest.raises(SteerError, match=r"chose \[1, 3\] experts"):
        summary(given, [ids, ids[:, :, :1]], {"<think>": 1.0})
    with pytest.raises(SteerError, match=r"layers \[3, 1\] were given.*increasing"):
        from_routed(given, [ids, ids], (3, 1), experts=16, tokenizer=tiny.tokenizer(), model=made.identity())


def test_a_trace_of_one_token_may_have_no_rows() -> None:
    given = traces(0)[:2]
    given[0] = replace(given[0], prompt_token_ids=given[0].prompt_token_ids[:1], completion_token_ids=())
    ids = routed(given, 0)
    found = summary(given, [ids[0][:0], ids[1]], {"<think>": 1.0})
    assert found.meta["traces"]["tokens"] == len(given[1].tokens)
    assert expert_scores(found, {"<think>": 1.0}, resamples=0).tokens == len(given[1].tokens)
