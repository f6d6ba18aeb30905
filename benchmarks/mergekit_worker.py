"""mergekit as a contestant of `benchmarks.edits`: run by the interpreter of `.venv-oracle`, imports nothing of ours.

Requests and answers as in `benchmarks.contestants`; a request brings the recipe. mergekit itself flushes nothing; what it
wrote is flushed here before the clock stops, file by file, since that is what all others wait for.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = 0.0
        if asked["work"] != "ready":
            os.sync()
            begun = time.perf_counter()
            configuration = MergeConfiguration.model_validate(asked["recipe"])
            run_merge(configuration, asked["out"], MergeOptions(quiet=True, copy_tokenizer=False))
            flush(asked["out"])
            answer = time.perf_counter() - begun
            shutil.rmtree(asked["out"])
        sys.stdout.write(json.dumps({"seconds": answer}) + "\n")
        sys.stdout.flush()


def flush(folder: str) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
