"""Every recorder that has a name: what it keeps of a trace does not depend on the traces and recorders beside it.

That each is right for a trace by itself is held to a naive float64 rewrite where the recorder is tested
(`test_means`, `test_segments`, `test_next_token`, `test_routing`, `test_attention`); here a trace is read alone, without
padding, and then in batches of any order and size, with padding, and with all recorders at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.collect.hooked import read_batch
from probes.collect.named import RECORDERS, parse
from probes.collect.plan import batch_of, finder
from probes.collect.recorders import Prepared
from steer.model import SteerableModel
from steer.traces import Trace
from tests.probes import made

FAMILIES = ("llama", "gemma2", "olmo2", "qwen3_moe", "gpt_oss")
OPTIONS = {
    "span_means": "span_means:sites=resid_pre+resid_mid+resid_post+attn_out,spans=thinking+answer+marker:;",
    "head_means": "head_means:spans=predicts_thinking",
    "segment_means": "segment_means:every=4,final=true",
    "next_token_stats": "next_token_stats:every=3,chunk=5",
    "router_counts": "router_counts:spans=all+thinking",
    "span_attention": "span_attention:keys=marker:;@all,queries=answer",
}
Rows = dict[str, dict[str, Tensor]]


def recorders(model: SteerableModel) -> list[Prepared]:
    """Return all that fit the model."""
    layers = tuple(range(model.anatomy.layers))
    names = [name for name in RECORDERS if name != "router_counts" or model.anatomy.expert_layers]
    return [parse(OPTIONS[name]).prepare(model, layers) for name in names]


def read(model: SteerableModel, prepared: Sequence[Prepared], batches: Sequence[Sequence[Trace]]) -> Rows:
    """Return quantity -> trace -> row."""
    find = finder(model, tuple(dict.fromkeys(span for one in prepared for span in one.spans)))
    found: Rows = {}
    for traces in batches:
        for name, rows in read_batch(model, prepared, batch_of(traces, find)).items():
            found.setdefault(name, {}).update(zip((trace.id for trace in traces), rows, strict=True))
    return found


def alike(found: Rows, wanted: Rows) -> None:
    """Compare to float32's rounding; counts are equal."""
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        scale = max((float(row.abs().max()) for row in rows.values() if row.numel()), default=0.0)
        assert found[name].keys() == rows.keys()
        for trace, row in rows.items():
            assert found[name][trace].shape == row.shape
            tolerance = 2e-5 * scale if row.is_floating_point() else 0
            error = (found[name][trace] - row).abs().max() if row.numel() else 0
            assert float(error) <= tolerance, f"{name} of {trace}"


def test_every_recorder_is_here() -> None:
    assert OPTIONS.keys() == RECORDERS.keys(), "a new recorder: say here with which options it is held to this"


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_padding_and_order_change_nothing(family: str) -> None:
    model, traces = made.model(family), list(made.traces(4, longest=12))
    prepared = recorders(model)
    alone = read(model, prepared, [[trace] for trace in traces])
    random = np.random.default_rng(0)
    for cuts in (1, 3):
        order = [traces[int(place)] for place in random.permutation(len(traces))]
        batches = [[order[int(place)] for place in part] for part in np.array_split(np.arange(len(order)), cuts)]
        alike(read(model, prepared, batches), alone)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recorders_together_are_recorders_one_by_one(family: str) -> None:
    """To the bit: else a cache that serves some of them would be seen."""
    model, traces = made.model(family), list(made.traces(4, longest=14))
    prepared = recorders(model)
    together = read(model, prepared, [traces])
    for one in prepared:
        by_itself = read(model, [one], [traces])
        assert by_itself.keys() == one.keeps.keys()
        for name, rows in by_itself.items():
            assert all(torch.equal(together[name][trace], row) for trace, row in rows.items()), name
