"""What the tests of probes are made of: tiny models, random traces with thoughts, hand-made summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import steer
from probes.collect.recorders import Kept
from probes.collect.rows import Row
from probes.collect.store import MemoryShard
from probes.collect.summary import Summary
from probes.collect.summary_file import describe
from steer import artifacts
from steer.identity import ModelIdentity
from steer.marks import Marks
from steer.model import SteerableModel
from steer.traces import Trace, Traces, make_trace
from tests import tiny

THINK, CLOSE, END, SEMICOLON = (tiny.WORDS.index(word) for word in ("<think>", "</think>", "<eos>", ";"))
FIRST_WORD = tiny.WORDS.index("0")


def model(family: str = "qwen3", **options: Any) -> SteerableModel:
    """Return a tiny random model, steerable."""
    return steer.wrap(*tiny.build(family, **options), name=f"tiny {family}")


def trace(
    item: str,
    sample: int,
    thought: Sequence[int],
    *,
    closed: bool = True,
    prompt: Sequence[int] = (8, 9, 11),
    **told: Any,
) -> Trace:
    """Return a trace whose thought holds `thought` between its marks, then an answer and the end token."""
    tokenizer = tiny.tokenizer()
    completion = [THINK, *thought, *([CLOSE, 30, 31, END] if closed else [])]
    return make_trace(item=item, sample=sample, prompt="x", prompt_token_ids=list(prompt), completion_token_ids=completion, tokenizer=tokenizer, marks=Marks.from_tokenizer(tokenizer), finish_reason="stop" if closed else "length", **told)  # fmt: skip


def traces(count: int = 12, seed: int = 0, samples: int = 2, longest: int = 30) -> Traces:
    """Return random traces of `count` items: thoughts of 1 to `longest` tokens with semicolons, every seventh unclosed."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count * samples):
        words = random.integers(FIRST_WORD, len(tiny.WORDS), size=int(random.integers(1, longest))).tolist()
        words[0] = SEMICOLON
        prompt = random.integers(FIRST_WORD, len(tiny.WORDS), size=int(random.integers(1, 6))).tolist()
        item = f"q{index // samples:03d}"
        made.append(
            trace(item, index % samples, words, closed=index % 7 != 3, prompt=prompt, group=str(index // samples % 3))
        )
    return Traces(
        made,
        {
            "tokenizer_id": steer.identity.tokenizer_id(tiny.tokenizer()),
            "marks": Marks.from_tokenizer(tiny.tokenizer()).to_dict(),
        },
    )


def identity(name: str = "made") -> ModelIdentity:
    """Return the identity of a model that does not exist."""
    return ModelIdentity(name, "none", "0" * 64)


def row(index: int, length: int | None, **told: Any) -> Row:
    """Return a row of a made summary: trace `index` with a thought of `length` tokens."""
    standard = {
        "item": f"q{index:03d}",
        "sample": 0,
        "closed": True,
        "length": length,
        "thinking_tokens": length,
        "positions": {"thinking": 3},
    }
    return Row(id=f"q{index:03d}/0", **{**standard, **told})


def summary(
    rows: Sequence[Row],
    values: dict[str, torch.Tensor],
    span: str = "thinking",
    shard: int = 5,
    model: ModelIdentity | None = None,
) -> Summary:
    """Return a summary in memory that holds `values` (row, layer, ...) for `rows`, cut into small shards."""
    quantities = {
        name: Kept(tuple(value.shape[1:]), tuple(range(value.shape[1])), span) for name, value in values.items()
    }
    meta = {
        "format_version": artifacts.FORMAT_VERSION,
        "model": (model or identity()).to_dict(),
        "layers": list(range(next(iter(values.values())).shape[1])),
        "keep": "trace",
        "traces": {"hash": "h"},
        "quantities": {name: describe(kept) for name, kept in quantities.items()},
    }
    starts = range(0, len(rows), shard)
    shards = [
        MemoryShard(
            tuple(rows[start : start + shard]), {name: value[start : start + shard] for name, value in values.items()}
        )
        for start in starts
    ]
    return Summary(meta, shards)
