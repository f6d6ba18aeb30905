"""One engine that reads: `.venv-vllm/bin/python tests/vllm/collecting.py JOB.json`; what it read lies beside the job.

A job is {"model": folder, "run": folder, "steering": file, "options": {…}}; summaries are written to `plain` and `steered`,
every row of the first two traces to `rows.safetensors`. Before anything is read, the prefix cache is warm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from vllm import SamplingParams

from probes.collect.run import collect
from probes.collect.vllm import VllmReader, places
from steer import SteeredLLM, Steering
from steer.model import load
from steer.traces import Traces
from tests.vllm.reading import STRENGTH, recorders


def main() -> None:
    """Read the run of a job."""
    source = Path(sys.argv[1])
    job, out = json.loads(source.read_text()), source.parent
    run = Traces.load(job["run"])
    hf = load(job["model"])
    kept = recorders(hf)
    steering = Steering.load(job["steering"])
    with SteeredLLM(job["model"], steerings={"s": steering}, capture=places(kept, hf), **job["options"]) as llm:
        prompts = [{"prompt_token_ids": list(trace.tokens)} for trace in run]
        for _ in range(2):
            outputs = llm.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        (out / "cached").write_text(str(sum(output.num_cached_tokens for output in outputs)))
        collect(VllmReader(llm), run, out / "plain", recorders=kept)
        collect(VllmReader(llm.with_("s", coefficient=STRENGTH)), run, out / "steered", recorders=kept)
        rows = llm.read(run[:2])
        tensors = {
            f"{number}/{site}/{layer}": tensor
            for number, each in enumerate(rows)
            for (site, layer), tensor in each.rows.items()
        }
        save_file(tensors, out / "rows.safetensors")


if __name__ == "__main__":  # The engine's other processes import this file again.
    main()
