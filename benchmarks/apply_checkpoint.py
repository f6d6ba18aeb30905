"""Patching a checkpoint on disk against copying the same files: `python -m benchmarks.apply_checkpoint`.

DESIGN §7, row "patch a checkpoint": the slope of time over size between two checkpoints, ours against
`copy_file_range` of the same files with fsync, which is what cannot be avoided without reflinks. The slope leaves the
fixed costs out (headers, manifest, flushing small files); they are told apart. Checkpoints are synthetic, bf16, four
shards, with the proportions of a dense model of hidden size 2048; 4 % of all heads, spread over the layers, are
patched. Anonymous memory is sampled in a fresh process.

    python -m benchmarks.apply_checkpoint                              about a minute: 0.25 and 1 GB
    python -m benchmarks.apply_checkpoint --small 2 --large 8 --pairs 15     the sizes of the design page
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import below, bootstrap, resident, tell
from edits.checkpoint.stream import copy_range, safetensors_header
from steer.operations import ProjectColumns
from steer.patches import Patch

HIDDEN, HEADS, WIDTH, INNER, VOCAB, SHARDS = 2048, 16, 128, 5632, 32000, 4
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BAR, TARGET = 1.25, 1.1


def make(folder: Path, size: float) -> Path:
    """Write a checkpoint of about `size` GB."""
    per_layer = sum(2 * rows * columns for rows, columns in LAYER.values())
    layers = max(SHARDS, round((size * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    names = {f"model.layers.{n}.{part}.weight": shape for n in range(layers) for part, shape in LAYER.items()}
    names |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": 4, "vocab_size": VOCAB, "head_dim": WIDTH, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    noise = (0.02 * torch.randn(1 << 22)).bfloat16().view(torch.uint8).numpy()
    listed, cut = list(names), np.linspace(0, len(names), SHARDS + 1).astype(int)
    index = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {
            name: ("BF16", names[name], 2 * names[name][0] * names[name][1])
            for name in listed[cut[shard] : cut[shard + 1]]
        }
        index |= dict.fromkeys(part, file)
        with (folder / file).open("wb") as stream:
            stream.write(safetensors_header(part))
            for _, _, count in part.values():
                stream.write(np.resize(noise, count).data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def patch_for(folder: Path) -> Patch:
    """Return a patch of 4 % of all heads, drawn evenly."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    chosen = random.Random(0).sample(
        [(layer, head) for layer in range(layers) for head in range(HEADS)], round(0.04 * layers * HEADS)
    )
    vectors = torch.randn(layers, HIDDEN, generator=torch.Generator().manual_seed(0))
    found = {layer: tuple(head for at, head in chosen if at == layer) for layer, _ in sorted(chosen)}
    return Patch(
        tuple(ProjectColumns(layer, "attention_output", heads, vectors[layer]) for layer, heads in found.items())
    )


def copied(folder: Path, out: Path) -> None:
    """The reference: every file by the kernel's copy, each one flushed."""
    out.mkdir()
    for path in sorted(folder.iterdir()):
        source, target = os.open(path, os.O_RDONLY), os.open(out / path.name, os.O_WRONLY | os.O_CREAT)
        copy_range(source, target, 0, path.stat().st_size)
        os.fsync(target)
        os.close(source)
        os.close(target)


def applied(folder: Path, out: Path) -> None:
    """Ours: plan and apply."""
    patch_for(folder).plan(folder).apply(out)


def seconds(work: Any, folder: Path, place: Path) -> float:
    """Time one run with an empty write queue before it; the output is removed, not timed."""
    out = place / "out"
    os.sync()
    begun = time.perf_counter()
    work(folder, out)
    spent = time.perf_counter() - begun
    shutil.rmtree(out)
    return spent


def memory(folder: Path, out: Path) -> dict[str, int]:
    """Sample this process's anonymous memory while it applies; bytes at rest with everything imported, and at most."""
    patch_for(folder).plan(folder)
    import_module("edits.checkpoint.apply")
    rest, peak, done = resident()["anonymous"], [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident()["anonymous"])

    thread = threading.Thread(target=sample)
    thread.start()
    applied(folder, out)
    done.set()
    thread.join()
    return {"at_rest": rest, "peak": peak[0], "allowed": rest + 2 * 2 * HIDDEN * HIDDEN}


def fresh_memory(folder: Path, place: Path) -> dict[str, Any]:
    """Call `memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.apply_checkpoint", "--memory-of", str(folder), "--folder", str(place)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(place / "out")
    return found | {"met": found["peak"] <= found["allowed"]}


def measured(small: Path, large: Path, place: Path, pairs: int) -> dict[str, Any]:
    """Time all works on both sizes, interleaved in an order drawn anew for each round."""
    works = {"apply": applied, "copy": copied, "copy again": copied}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    order = random.Random(0)
    for number in range(pairs + 1):
        for name in order.sample(list(works), len(works)):
            pair = seconds(works[name], small, place), seconds(works[name], large, place)
            if number:  # The first round warms the page cache.
                times[name].append(pair)

    def ratios(name: str, cost: Any) -> dict[str, float]:
        return vars(bootstrap([cost(a) / cost(b) for a, b in zip(times[name], times["copy"], strict=True)]))

    kinds = {"slope": lambda t: t[1] - t[0], "small": lambda t: t[0], "large": lambda t: t[1]}
    return {
        "pairs": pairs,
        "reference": "copy_file_range and fsync of the same files",
        "ratio": {kind: ratios("apply", cost) for kind, cost in kinds.items()},
        "control": {kind: ratios("copy again", cost) for kind, cost in kinds.items()},
        "seconds": {
            name: {"small": float(np.median([t[0] for t in pair])), "large": float(np.median([t[1] for t in pair]))}
            for name, pair in times.items()
        },
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", type=float, default=0.25, help="GB of the smaller checkpoint")
    parser.add_argument("--large", type=float, default=1.0, help="GB of the larger one")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of is not None:
        print(json.dumps(memory(options.memory_of, options.folder / "out")))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        small, large = make(place / "small", options.small), make(place / "large", options.large)
        result = measured(small, large, place, options.pairs)
        result |= {"gigabytes": {"small": options.small, "large": options.large}, "target": TARGET}
        result |= below(result["ratio"]["slope"], BAR)
        result["memory"] = {"small": fresh_memory(small, place), "large": fresh_memory(large, place)}
    tell("apply_checkpoint", result)


if __name__ == "__main__":
    main()
