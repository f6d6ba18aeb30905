"""Starting an engine: the folder that vLLM reads, its options, and the variables of the environment that it looks at.

On processors vLLM's kernels know heads of 32 numbers and more, so an organism runs there from a copy with wider heads and
the same function (`steer.backends.vllm.widened`). The engine lives in the caller's own process there, uncompiled: a
process of its own and a compiler cost a minute at start and save nothing on small models. What the caller says wins.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer.anatomy.headers import read_headers
from steer.backends.vllm.widened import NARROWEST, head_width, widen
from steer.errors import SteerError
from steer.marks import Marks
from steer.sources import Source
from steer.weights import cache_folder, weights_id

MOST, MOST_ON_PROCESSORS = 256, 32
"""Requests that run at once unless the caller says otherwise."""
SMALL_CACHE = 2**29
"""Bytes of an organism's key-value cache on processors; vLLM would take a share of the machine's memory."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
"""Nothing is reported home, stdout belongs to the caller, and vLLM says what is wrong alone: VLLM_LOGGING_LEVEL=INFO for more."""
ON_PROCESSORS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Machine:
    """What vLLM found to run on.

    Attributes:
        version: of vLLM.
        device: such as `cpu` or `cuda`.
    """

    version: str
    device: str

    @property
    def processors(self) -> bool:
        """Whether there is no accelerator."""
        return self.device == "cpu"


def machine() -> Machine:
    """Ask vLLM where it runs.

    Raises:
        SteerError: vLLM is not installed.
    """
    require()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import vllm
    from vllm.platforms import current_platform

    return Machine(vllm.__version__, str(current_platform.device_type))


def require() -> None:
    """Refuse to go on without vLLM.

    Raises:
        SteerError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise SteerError(
            "vLLM is not installed in this environment", "vllm>=0.30,<0.34", "Run `pip install 'reasoning-steer[vllm]'`"
        )


def runnable(source: Source, processors: bool) -> Path:
    """Return the folder that vLLM is to read: the model's own, or a copy with wider heads, made once and said on stderr.

    Args:
        source: of the model.
        processors: whether there is no accelerator.

    Raises:
        SteerError: heads too narrow for vLLM's kernels in a family that is not one of the organisms'.
        OSError: the cache cannot be written.
    """
    width = head_width(source.folder)
    if not processors or width >= NARROWEST:
        return source.folder
    identity = weights_id(source.folder, read_headers(source.folder).files, compute=True)
    folder = cache_folder() / "vllm" / f"{source.folder.name}-{identity[:16]}-{2 * width}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            widen(source.folder, beside)
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # Another process may have been faster.
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    sys.stderr.write(
        f"{source.name}: heads of {width} numbers, and vLLM on processors knows {NARROWEST} and more; runs from a copy with "
        f"wider heads and the same function, {folder}\n"
    )
    return folder


def options(
    folder: Path, here: Machine, given: Mapping[str, Any], organism: bool, marks: Marks, tokenizer: Any
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`, as the caller gave them and where nothing was said as this machine wants them.

    Args:
        folder: from `runnable`.
        here: the machine.
        given: of the caller.
        organism: whether the model is one of ours.
        marks, tokenizer: for `thinking_token_budget`, where vLLM's marks can be the same.
    """
    own: dict[str, Any] = {"max_num_seqs": MOST, "seed": 0, "use_tqdm_on_load": False}
    if here.processors:
        alone = all(given.get(f"{way}_parallel_size", 1) == 1 for way in ("tensor", "pipeline", "data"))
        for name, value in ON_PROCESSORS.items():
            if alone:
                os.environ.setdefault(name, value)
        own |= {"max_num_seqs": MOST_ON_PROCESSORS, "enforce_eager": alone}
        if organism and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            own["kv_cache_memory_bytes"] = SMALL_CACHE
    if stored(folder) == "float32":
        own["dtype"] = "float32"  # Of its own accord vLLM would run these weights in half precision.
    texts = mark_texts(marks, tokenizer)
    if texts is not None and "reasoning_config" not in given and "reasoning_parser" not in given:
        own["reasoning_config"] = {"reasoning_start_str": texts[0], "reasoning_end_str": texts[1]}
    return {**own, **given, "model": str(folder)}


def stored(folder: Path) -> str | None:
    """Return the type of a checkpoint's weights as its config.json has it; None where it does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    found = next((each[name] for each in (config, text) for name in ("dtype", "torch_dtype") if each.get(name)), None)
    return None if found is None else str(found)


def mark_texts(marks: Marks, tokenizer: Any) -> tuple[str, str] | None:
    """Return both marks as text, where there is one of each and it is one token that this text becomes; else None."""
    if len(marks.opening) != 1 or len(marks.closing) != 1:
        return None
    texts = []
    for mark in (*marks.opening, *marks.closing):
        text = str(tokenizer.decode(list(mark)))
        if len(mark) != 1 or list(tokenizer(text, add_special_tokens=False)["input_ids"]) != list(mark):
            return None
        texts.append(text)
    return texts[0], texts[1]
