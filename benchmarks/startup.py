"""How long one waits before anything happens: `steer --help`, `import steer`, `steer inspect` of 400 tensors.

DESIGN §7: targets 0.15, 0.1 and 0.5 s; bars 0.3, 0.2 and 1 s. Each runs in a fresh process, beside an empty Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import bootstrap, tell, timed

RUNS = 15
BARS = {"help": (0.15, 0.3), "import": (0.1, 0.2), "inspect": (0.5, 1.0)}
LAYERS = 45


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = checkpoint(Path(folder) / "model")
        steer = [sys.executable, "-m", "steer.cli"]
        commands = {
            "empty": [sys.executable, "-c", "pass"],
            "help": [*steer, "--help"],
            "import": [sys.executable, "-c", "import steer"],
            "inspect": [*steer, "inspect", str(Path(folder) / "model"), "--json"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(RUNS + 1):
            for name, command in commands.items():
                spent, _ = timed(partial(subprocess.run, command, check=True, capture_output=True))
                if number:
                    seconds[name].append(spent)
    results = {name: vars(bootstrap(times)) for name, times in seconds.items()}
    verdicts = {name: {"target": t, "bar": b, "met": results[name]["high"] < b} for name, (t, b) in BARS.items()}
    tell("startup", {"tensors": tensors, "runs": RUNS, "seconds": results, "verdicts": verdicts})


def checkpoint(folder: Path) -> int:
    """Write a llama folder of small zero tensors in the ordinary layout and return their number."""
    folder.mkdir()
    hidden, width = 8, 16
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (32, hidden)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (hidden, width)}
        shapes |= {f"{start}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32,
        "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return len(shapes)


if __name__ == "__main__":
    main()
