"""Means over a span at every layer, against the same call of the backbone that keeps nothing.

DESIGN §7 row 1: target 1.00, the interval below 1.10, resident memory flat in the number of traces. Beside us, doing the
same reduction with their hooks and against the same plain call: TransformerLens and nnsight, where installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Work, below, compare, resident, tell
from benchmarks.subject import arguments, model_of, random_ids, random_model
from probes.collect.run import collect
from steer.model import SteerableModel
from steer.trace import Trace

ROWS, PROMPT, REPLY = 8, 16, 48
BAR = 1.10
SHARDS = (2, 12)
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}  # glibc otherwise keeps what is freed
MEMORY_SITES = ("resid_mid", "resid_post", "attn_out", "mlp_out")


def main() -> None:
    """Measure and print; with --memory N instead: collect N shards and print this process's memory."""
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(memory_after(int(sys.argv[2]))))
        return
    asked = arguments(__doc__)
    model = model_of(asked.model)
    ids = random_ids(model, ROWS, PROMPT + REPLY)
    works: dict[str, Work] = {
        "plain": lambda: plain(model, torch.tensor(ids)),
        "steer": lambda: collect(model, traces(ids), sites=("resid_post",), spans=("before_answer",)),
    }
    works |= {} if asked.alone else others(model, torch.tensor(ids))
    result = compare(works, "plain", pairs=asked.pairs)
    agreement = {name: largest_difference(model, ids, works[name]) for name in works if name not in ("plain", "steer")}
    result |= {
        "model": model.name,
        "batch": [ROWS, PROMPT + REPLY],
        "verdict": below(result["ratio"]["steer"], BAR),
        "largest_difference_from_steer": agreement,
        "memory": memory(),
    }
    tell("span_means", result)


@torch.no_grad()
def plain(model: SteerableModel, ids: Tensor) -> Tensor:
    """Call the backbone as anybody would."""
    hidden: Tensor = model.backbone(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    return hidden


def traces(ids: list[list[int]]) -> list[Trace]:
    """Return traces whose whole reply stands before an answer that never came."""
    rows = [(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in ids]
    return [Trace(f"{n:05d}/0", f"{n:05d}", 0, "", prompt, reply) for n, (prompt, reply) in enumerate(rows)]


def others(model: SteerableModel, ids: Tensor) -> dict[str, Work]:
    """Return the same means by other libraries."""
    found: dict[str, Work] = {}
    layers = range(model.anatomy.layers)
    if find_spec("transformer_lens") is not None:
        from steer.backends.transformer_lens import wrap

        bridge = wrap(model.hf).bridge

        @torch.no_grad()
        def lens() -> Tensor:
            means: list[Tensor] = []

            def keep(value: Tensor, hook: object) -> Tensor:
                means.append(value[:, PROMPT:].mean(1))
                return value

            with bridge.hooks(fwd_hooks=[(f"blocks.{n}.hook_resid_post", keep) for n in layers]):
                bridge(ids)
            return torch.stack(means, 1)

        found["transformer-lens (with its head)"] = lens
    if find_spec("nnsight") is not None:
        from nnsight import TransformersModel

        traced = TransformersModel(model.hf, tokenizer=model.tokenizer, task="text-generation")

        @torch.no_grad()
        def sight() -> Tensor:
            with traced.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
                kept: Any = list().save()  # type: ignore[attr-defined]  # noqa: C408  (nnsight gives every object a save)
                for n in layers:
                    output = traced.model.layers[n].output
                    kept.append((output[0] if isinstance(output, tuple) else output)[:, PROMPT:].mean(1))
            return torch.stack(list(kept), 1)

        found["nnsight (with its head)"] = sight
    return found


def largest_difference(model: SteerableModel, ids: list[list[int]], work: Work) -> float:
    """Compare another library's means with ours: a benchmark of two things that differ says nothing."""
    ours = collect(model, traces(ids), sites=("resid_post",), spans=("before_answer",)).values(
        "resid_post/before_answer"
    )
    theirs = work()
    assert isinstance(theirs, Tensor)
    return float((ours - theirs).abs().max())


def memory() -> dict[str, object]:
    """Return anonymous memory after collecting few and many shards, each in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.span_means", "--memory"]
    root = Path(__file__).parents[1]
    options: dict[str, Any] = {"cwd": root, "env": {**os.environ, **GIVE_BACK}, "check": True, "capture_output": True}
    runs = [subprocess.run([*command, str(n)], **options) for n in SHARDS]
    few, many = (json.loads(run.stdout) for run in runs)
    return {"few": few, "many": many, "grown_by_bytes": many["anonymous"] - few["anonymous"]}


def memory_after(shards: int) -> dict[str, int]:
    """Collect `shards` shards into a folder and return this process's memory and what the folder holds.

    The model has SmolLM2's depth and width and little else, so that its own memory does not hide what is kept.
    """
    model = random_model(intermediate_size=64, vocab_size=512)
    made = traces(random_ids(model, 64 * shards, PROMPT + 4))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "summary"
        collect(model, made, out, sites=MEMORY_SITES, spans=("before_answer",))
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return {"shards": shards, "written": written, **resident()}


if __name__ == "__main__":
    main()
