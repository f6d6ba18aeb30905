"""What steering costs in vLLM: idle, half and all of a batch steered on every layer, against vLLM without the plugin.

DESIGN §7 row 3: at most 1.02 on a GPU and flat in the number of different steerings; on a processor the ratios are only
reported. Two engines, one plain and one that may be steered at `resid_post` of all layers, live in processes of their
own and take turns, in an order drawn anew each round; the plain one runs twice, for the control. Greedy, a fixed number
of tokens for each of a batch's requests; a vector so short that the same tokens come out.

    python -m benchmarks.vllm                                       # a made-up Qwen 3 of 22 million weights, on a processor
    python -m benchmarks.vllm --compiled
    python -m benchmarks.vllm --model Qwen/Qwen3-8B --dtype bfloat16 --compiled --batch 1 32 256      # where there is a GPU

The engines run in `.venv-vllm` where that is (`make vllm`), else in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import bootstrap, tell

ROOT = Path(__file__).parents[1]
PROMPT, NORM = 32, 1e-4
PROCESSOR = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Measure and print, or be one of the engines."""
    asked = _arguments()
    if asked.engine:
        _engine(asked)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = asked.model or str(_made_up(Path(folder) / "model"))
        engines = {kind: stack.enter_context(_started(kind, model, asked)) for kind in ("plain", "steered")}
        found = {str(batch): _measured(engines, batch, asked) for batch in asked.batch}
    tell(
        "vllm",
        {"model": asked.model or "made up", "compiled": asked.compiled, "new_tokens": asked.new, "batches": found},
    )


def works(batch: int) -> dict[str, tuple[str, list[int]]]:
    """Return name -> engine, and per request which steering it has (0: none)."""
    found = {
        "plain": ("plain", [0] * batch),
        "plain again": ("plain", [0] * batch),
        "idle": ("steered", [0] * batch),
        "half": ("steered", [1 if row % 2 else 0 for row in range(batch)]),
        "all": ("steered", [1] * batch),
    }
    for different in (4, 32, 256):
        if 1 < different <= batch:
            found[f"all, {different} different"] = ("steered", [1 + row % different for row in range(batch)])
    if batch > 1:
        found.setdefault(f"all, {batch} different", ("steered", list(range(1, batch + 1))))
    return found


def _measured(engines: dict[str, Any], batch: int, asked: argparse.Namespace) -> dict[str, Any]:
    runs = works(batch)
    order = np.random.default_rng(0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    tokens: dict[str, list[list[int]]] = {}
    for number in range(asked.warmups + asked.pairs):
        for name in order.permutation(list(runs)):
            kind, steerings = runs[name]
            answer = engines[kind](steerings)
            tokens[name] = answer["tokens"]
            if number >= asked.warmups:
                seconds[name].append((answer["wall"], answer["cpu"]))
    different = [name for name in runs if tokens[name] != tokens["plain"]]
    if different:
        raise SystemExit(f"benchmarks.vllm: other tokens came out with {', '.join(different)}; nothing is compared.")

    def ratios(which: int) -> dict[str, Any]:
        plain = [times[which] for times in seconds["plain"]]
        return {
            name: vars(bootstrap([times[which] / one for times, one in zip(seconds[name], plain, strict=True)]))
            for name in runs
            if name != "plain"
        }

    wall = float(np.median([times[0] for times in seconds["plain"]]))
    return {
        "rounds": asked.pairs,
        "milliseconds_per_step": 1000 * wall / asked.new,
        "tokens_per_second": batch * asked.new / wall,
        "wall": ratios(0),
        "processor": ratios(1),
    }


@contextmanager
def _started(kind: str, model: str, asked: argparse.Namespace) -> Iterator[Any]:
    """Start an engine and give a function that runs a batch in it."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    options = ["--engine", kind, "--model", model, "--dtype", asked.dtype, "--new", str(asked.new)]
    options += ["--batch", *map(str, asked.batch), *(["--compiled"] if asked.compiled else [])]
    environment = {**os.environ, **PROCESSOR, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    process = subprocess.Popen(
        [python, "-m", "benchmarks.vllm", *options],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None, "both were asked for"

    def answer() -> dict[str, Any]:
        for line in process.stdout or ():
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
        raise SystemExit(f"benchmarks.vllm: the {kind} engine ended; see above.")

    def run(steerings: Sequence[int]) -> dict[str, Any]:
        assert process.stdin is not None, "asked for above"
        process.stdin.write(json.dumps(list(steerings)) + "\n")
        process.stdin.flush()
        return answer()

    try:
        answer()
        yield run
    finally:
        process.stdin.close()
        process.wait(timeout=120)


def _engine(asked: argparse.Namespace) -> None:
    """Run batches as they are asked for on stdin, and tell seconds and tokens on stdout."""
    from vllm import LLM, SamplingParams

    batch = max(asked.batch)
    options: dict[str, Any] = {}
    arguments: list[dict[str, Any] | None] = [None]
    if asked.engine == "steered":
        options["additional_config"], arguments = _declared(asked.model, batch)
    llm = LLM(
        model=asked.model,
        dtype=asked.dtype,
        enforce_eager=not asked.compiled,
        max_model_len=PROMPT + asked.new,
        max_num_seqs=batch,
        max_num_batched_tokens=max(PROMPT * batch, 512),
        enable_prefix_caching=False,
        seed=0,
        **options,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rows = np.random.default_rng(0).integers(10, vocabulary, size=(batch, PROMPT)).tolist()
    print("@{}", flush=True)
    for line in sys.stdin:
        steerings = json.loads(line)
        params = [
            SamplingParams(temperature=0.0, max_tokens=asked.new, ignore_eos=True, extra_args=arguments[which])
            for which in steerings
        ]
        prompts = [{"prompt_token_ids": row} for row in rows[: len(steerings)]]
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print("@" + json.dumps({**spent, "tokens": tokens}), flush=True)


def _declared(model: str, batch: int) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """Return the engine's declaration, and what requests say for no steering and for each of `batch` others."""
    import torch

    from steer.anatomy.headers import read_headers
    from steer.anatomy.resolve import resolve
    from steer.backends.vllm import Declared, Store
    from steer.backends.vllm.request import Asked
    from steer.directions import Direction
    from steer.interventions import Add
    from steer.sources import locate
    from steer.steering import Steering

    headers = read_headers(locate(model).folder)
    anatomy = resolve(headers.config, headers.shapes)
    vectors = torch.randn(anatomy.layers, anatomy.hidden, generator=torch.Generator().manual_seed(0))
    vectors *= NORM / vectors.norm(dim=-1, keepdim=True)
    direction = Direction(vectors, tuple(range(anatomy.layers)), "resid_post")
    steering = Steering((Add(direction, "resid_post"),))
    store = Store(tempfile.mkdtemp(prefix="steer-benchmark-"))
    base = store.put(steering)
    declared = Declared.of(anatomy, store.folder, [steering], slots=batch)
    return declared.to_config(), [None, *(Asked("s", base, 1 + row / batch).to_args() for row in range(batch))]


def _made_up(folder: Path) -> Path:
    """Write a Qwen 3 with random weights: 6 layers of 512, heads of 64."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(2048)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: made up")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="torch.compile (and CUDA graphs) instead of eager")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="requests at once")
    parser.add_argument("--new", type=int, default=32, help="tokens that each request writes")
    parser.add_argument("--pairs", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--engine", choices=["plain", "steered"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
