"""Counting experts, and scoring them: `python -m benchmarks.experts [--pairs N] [--threads N] [--large N]`.

* `pass`: the reading pass with counts, against the same call of the backbone that keeps nothing; the interval is to lie below 1.05.
* `generation`: replies counted while they are written (`model.routed`), against replies written; to lie below 1.05 as well. Beside
  it the price of a second reading: small where writing is bound by memory, as on a GPU, and not where it is bound by arithmetic.
* `scores`: seconds and peak anonymous memory of `expert_scores` with interval and chances on a summary as large as
  DeepSeek R1's (58 layers of 256 experts, 8 chosen), for N and 4 N traces; a summary made of numbers, no model.

The model is a random mixture: 8 layers of 32 experts, 4 chosen, width 384.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import steer
from benchmarks.measure import Work, below, compare, resident, tell, timed
from benchmarks.span_means import plain
from benchmarks.steered_generation import prompt_text
from benchmarks.subject import BUNDLED
from benchmarks.worker import EVERY, GIVE_BACK, ROOT
from probes.collect.run import collect
from probes.collect.summary import Summary
from probes.experts import expert_scores, from_routed, recorder_for
from steer.generation import Sampling
from steer.identity import ModelIdentity
from steer.model import SteerableModel
from steer.prompts import RawText
from steer.trace import Trace
from steer.traces import Traces

ROWS, NEW, BAR = 8, 64, 1.05
MARKERS = {"<think>": 1.0, "</think>": -1.0}
LAYERS, EXPERTS, CHOSEN, TOKENS = 58, 256, 8, 200


def main() -> None:
    """Measure and print; with --scores N instead: score N traces and print seconds and memory of this process."""
    if sys.argv[1:2] == ["--scores"]:
        print(json.dumps(scored(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is the steadiest on a shared machine")
    parser.add_argument("--large", type=int, default=128, help="traces of the smaller large summary; 0 leaves it out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = mixture()
    result: dict[str, Any] = {"generation": counting(model, asked.pairs), "pass": reading(model, asked.pairs)}
    if asked.large:
        result["scores"] = [scores_of(count) for count in (asked.large, 4 * asked.large)]
    tell("experts", result)


def mixture() -> SteerableModel:
    """Return a random Qwen 3 with experts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8192, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        moe_intermediate_size=192, num_experts=32, num_experts_per_tok=4, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    model = steer.wrap(hf, AutoTokenizer.from_pretrained(BUNDLED), name="random mixture")
    model.hf.generation_config.eos_token_id = None
    return model


def counting(model: SteerableModel, pairs: int) -> dict[str, Any]:
    """Return the time of replies with counts over that of replies alone."""
    text = f"<think> {prompt_text(model)} </think>"

    def generate() -> Traces:
        return model.generate([RawText(text)] * ROWS, sampling=Sampling(temperature=0.0, max_new_tokens=NEW))

    def counted() -> Summary:
        with model.routed() as routes:
            written = generate()
        anatomy = model.anatomy
        kept = [routes[trace] for trace in written]
        return from_routed(
            written, kept, routes.layers, experts=anatomy.experts, tokenizer=model.tokenizer, model=model.identity, markers=MARKERS
        )  # fmt: skip

    works: dict[str, Work] = {
        "generation": generate,
        "generation and counts": counted,
        "generation, then a pass with counts": lambda: collect(model, generate(), recorders=[recorder_for(MARKERS)]),
    }
    found = compare(works, "generation", pairs=pairs)
    return found | {"new": [ROWS, NEW], "verdict": below(found["ratio"]["generation and counts"], BAR)}


def reading(model: SteerableModel, pairs: int) -> dict[str, Any]:
    """Return the time of a pass with counts over that of the backbone alone."""
    found = traces(ROWS, 128, model.anatomy.vocab)
    ids = torch.tensor([trace.tokens for trace in found])
    works: dict[str, Work] = {
        "plain": lambda: plain(model, ids),
        "counts": lambda: collect(model, found, recorders=[recorder_for(MARKERS)]),
    }
    measured = compare(works, "plain", pairs=pairs)
    return measured | {"batch": list(ids.shape), "verdict": below(measured["ratio"]["counts"], BAR)}


def traces(count: int, length: int, vocabulary: int) -> list[Trace]:
    """Return traces of random tokens, each with one opening and one closing mark."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    marks = [tokenizer.convert_tokens_to_ids(text) for text in MARKERS]
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        words = random.integers(10, vocabulary, size=length)
        words[[4, length // 2]] = marks
        found.append(Trace(f"{number:05d}/0", f"{number:05d}", 0, "", tuple(words[:4].tolist()), tuple(words[4:].tolist())))  # fmt: skip
    return found


def scores_of(count: int) -> dict[str, Any]:
    """Score `count` traces in a process of its own and return what it told."""
    with tempfile.TemporaryDirectory() as folder:
        large_summary(Path(folder) / "summary", count)
        command = [sys.executable, "-m", "benchmarks.experts", "--scores", str(Path(folder) / "summary")]
        told = subprocess.run(command, cwd=ROOT, env=os.environ | GIVE_BACK, capture_output=True, text=True, check=True)
    return {"traces": count, **json.loads(told.stdout)}


def large_summary(out: Path, count: int) -> None:
    """Write the summary of routed ids drawn at random, popular and rare experts among them."""
    random = np.random.default_rng(0)
    odds = random.normal(size=(LAYERS, EXPERTS)).astype(np.float32)

    def ids() -> np.ndarray[Any, np.dtype[np.int64]]:
        noise = random.gumbel(size=(TOKENS, LAYERS, EXPERTS)).astype(np.float32)
        return np.argpartition(-(odds + noise), CHOSEN, axis=2)[:, :, :CHOSEN]

    given = traces(count, TOKENS, 30)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = ModelIdentity("numbers", "none", "0" * 64)
    from_routed(given, (ids() for _ in given), range(3, 3 + LAYERS), experts=EXPERTS, tokenizer=tokenizer, model=model, markers=MARKERS, out=out)  # fmt: skip


def scored(folder: Path) -> dict[str, Any]:
    """Score a summary and return the seconds and the peak of anonymous memory above what was there before."""
    torch.set_num_threads(1)
    summary = Summary.load(folder)
    rest, peak, done = resident()["anonymous"], [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident()["anonymous"])
            done.wait(EVERY)

    watch = threading.Thread(target=look)
    watch.start()
    wall, _ = timed(lambda: expert_scores(summary, MARKERS))
    done.set()
    watch.join()
    return {"seconds": round(wall, 2), "peak_bytes": peak[0] - rest}


if __name__ == "__main__":
    main()
