"""Generation against Hugging Face's own `generate`, against the odds themselves, and against a second process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steer
from steer.generation import generate, generate_shard
from steer.prompts import Prompt, render
from steer.sampling import Sampling
from steer.shards import Journal, cut
from steer.traces import Traces
from tests.steer.test_generation import items
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_hugging_face_generates_for_each_prompt_alone(family, attention, tiny):
    # Eager attention takes its softmax in fp32, where the fp64 mask overflows at padding: transformers' own limit.
    if family == "gpt_oss" and attention == "sdpa":
        return  # transformers has no such kernel for its attention sinks.
    hf, tokenizer = tiny(family, dtype=torch.float64 if attention == "sdpa" else torch.float32)
    hf.set_attn_implementation(attention)
    if "num_experts_per_tok" in FAMILIES[family]:
        hf.set_experts_implementation("eager")  # The grouped kernels know no fp64.
    for trace in generate(steer.wrap(hf, tokenizer), items(4), sampling=Sampling(0.0, max_new_tokens=10), batch_size=2):
        ids = torch.tensor([trace.prompt_token_ids])
        theirs = hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert list(trace.completion_token_ids) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options", [Sampling(1.0, max_new_tokens=1), Sampling(0.7, 0.8, 0, 1), Sampling(2.0, 1.0, 6, 1)]
)
def test_first_tokens_have_the_odds_that_hugging_faces_own_warpers_give(options, tiny):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    hf, tokenizer = tiny("llama")
    model = steer.wrap(hf, tokenizer)
    draws = 2000
    traces = generate(model, [Prompt("a", "a b c")], samples=draws, sampling=options, batch_size=1000)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    ids = torch.tensor([render(tokenizer, "a b c").token_ids])
    with torch.no_grad():
        odds = torch.softmax(warpers(ids, hf(input_ids=ids).logits[:, -1].double()), -1)[0].numpy()
    counts = np.bincount([trace.completion_token_ids[0] for trace in traces], minlength=len(odds))
    assert (counts[odds == 0] == 0).all()
    deviation = np.abs(counts - draws * odds)
    assert (deviation <= 4.5 * np.sqrt(draws * odds * (1 - odds)) + 1).all()  # Binomial, 4.5 standard deviations.


def test_low_precision_stays_near_the_plain_forward(tiny):
    model = steer.wrap(*tiny("qwen3", dtype=torch.bfloat16))
    for trace in generate(model, items(5), sampling=Sampling(0.0, max_new_tokens=12), batch_size=2):
        with torch.no_grad():
            plain = model.hf(input_ids=torch.tensor([trace.tokens])).logits[0, trace.prompt_length - 1 : -1].float()
        chosen = plain.gather(1, torch.tensor(trace.completion_token_ids)[:, None])[:, 0]
        assert (plain.amax(-1) - chosen <= 0.05 * plain.abs().max()).all()  # At most a near tie goes the other way.


def test_another_process_writes_the_same_bytes(tiny_folder, tmp_path):
    """Other hash seed, other order of the prompts, other batch of imports: the same run folder."""
    rows = [f'{{"id": "q{i:02d}", "prompt": "{" ".join("abcdefghij"[: 1 + i % 10])}"}}' for i in range(66)]
    runs = []
    for number, order in enumerate((rows, rows[::-1])):
        prompts, out = tmp_path / f"p{number}.jsonl", tmp_path / f"run{number}"
        prompts.write_text("\n".join(order))
        words = [
            "generate",
            str(tiny_folder("qwen3")),
            "--prompts",
            str(prompts),
            "--temperature",
            "1",
            "--max-new-tokens",
            "6",
            "--seed",
            "3",
            "--out",
            str(out),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "steer.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        runs.append(out)
    for name in ("traces.jsonl", "run.yaml"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_a_journal_of_shards_resumes_to_the_same_bytes(tiny, tmp_path):
    model = steer.wrap(*tiny("qwen3"))
    prompts = {prompt.id: prompt for prompt in items(20, 8)}
    options = {"sampling": Sampling(1.0, max_new_tokens=5), "seed": 1}
    shards = cut(prompts, 8)

    def work(journal: Journal, several) -> None:
        for shard in several:
            if not journal.has(shard):
                journal.write(shard, Traces(generate_shard(model, [prompts[i] for i in shard.ids], **options)).lines())

    def result(journal: Journal) -> bytes:
        return b"".join(journal.read(shard) for shard in shards)

    whole, parts = Journal(tmp_path / "whole", {"seed": 1}), Journal(tmp_path / "parts", {"seed": 1})
    work(whole, shards)
    work(parts, shards[2:])  # Another worker's share first,
    work(parts, shards)  # then the rest; what is there is not made again.
    assert result(whole) == result(parts) and result(whole).count(b"\n") == 20
