"""Run by the interpreter of `.venv-oracle`: merge each recipe of a JSON list with mergekit. Imports nothing of ours."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main() -> None:
    """Write what each merge took to stdout, as JSON."""
    torch.set_num_threads(1)
    seconds = []
    for recipe, out in json.loads(Path(sys.argv[1]).read_text()):
        start = time.perf_counter()
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text())), out, MergeOptions(quiet=True)
        )
        seconds.append(time.perf_counter() - start)
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
