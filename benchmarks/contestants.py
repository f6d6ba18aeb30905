"""What is timed against what in `benchmarks.edits`, and the process that runs it, which answers line by line.

A request is one line of JSON on stdin: {"work": name, "folders": [...], "out": folder}; the answer {"seconds": s} on
stdout. The write queue is emptied before the clock starts, and no work leaves anything unflushed when it stops. What was
written is removed afterwards, untimed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import edits
from benchmarks.synthetic import patch_for, recipe_for
from edits.checkpoint.stream import copy_range, write_all

STEP = 1 << 24
Work = Callable[[Sequence[Path], Path], None]


def apply(folders: Sequence[Path], out: Path) -> None:
    """Ours: plan and apply."""
    patch_for(folders[0]).plan(folders[0]).apply(out)


def copy(folders: Sequence[Path], out: Path) -> None:
    """Every file by the kernel's copy, each flushed before the next: the reference for `apply`."""
    out.mkdir()
    for path in sorted(folders[0].iterdir()):
        os.close(_flushed(_copied(path, out)))


def copy_behind(folders: Sequence[Path], out: Path) -> None:
    """The same, but a file is flushed by a second thread while the next one is copied, as `apply` does it."""
    out.mkdir()
    with ThreadPoolExecutor(1) as flushing:
        waiting = [flushing.submit(_flushed, _copied(path, out)) for path in sorted(folders[0].iterdir())]
        for each in waiting:
            os.close(each.result())


def load_and_save(folders: Sequence[Path], out: Path) -> None:
    """`load_file` and `save_file` of every shard, nothing changed, each flushed."""
    out.mkdir()
    for path in sorted(folders[0].glob("*.safetensors")):
        save_file(load_file(path), out / path.name, metadata={"format": "pt"})
        _flush(out / path.name)


def merge(folders: Sequence[Path], out: Path) -> None:
    """Ours: task arithmetic by the recipe."""
    edits.merge(recipe_for(list(folders)), out)


def read_and_write(folders: Sequence[Path], out: Path) -> None:
    """Read every file of all folders, write those of the first, each flushed: the reference for `merge`."""
    out.mkdir()
    buffer = bytearray(STEP)
    for path in sorted(folders[0].iterdir()):
        target = os.open(out / path.name, os.O_WRONLY | os.O_CREAT, 0o644)
        for folder in reversed(folders):
            source, position = os.open(folder / path.name, os.O_RDONLY), 0
            while count := os.preadv(source, [buffer], position):
                if folder is folders[0]:
                    write_all(target, bytes(memoryview(buffer)[:count]) if count < STEP else buffer, position)
                position += count
            os.close(source)
        os.close(_flushed(target))


def loop(folders: Sequence[Path], out: Path) -> None:
    """The plain way: tensor by tensor in float32, shard by shard with `save_file`, each flushed."""
    out.mkdir()
    for path in sorted(folders[0].glob("*.safetensors")):
        files = [safe_open(folder / path.name, "pt") for folder in folders]
        merged: dict[str, Tensor] = {}
        for name in files[0].keys():  # noqa: SIM118  (not a mapping)
            base, *models = (file.get_tensor(name).float() for file in files)
            merged[name] = (base + 0.5 * (models[0] - base) + 0.5 * (models[1] - base)).bfloat16()
        save_file(merged, out / path.name, metadata={"format": "pt"})
        _flush(out / path.name)


WORKS: dict[str, Work] = {
    "apply": apply,
    "copy": copy,
    "copy, flushed behind": copy_behind,
    "load and save": load_and_save,
    "merge": merge,
    "read and write": read_and_write,
    "loop": loop,
}
IMPORTS = {"apply": "edits.checkpoint.apply", "merge": "edits.merge.run"}


def _copied(path: Path, out: Path) -> int:
    source, target = os.open(path, os.O_RDONLY), os.open(out / path.name, os.O_WRONLY | os.O_CREAT, 0o644)
    copy_range(source, target, 0, path.stat().st_size)
    os.close(source)
    return target


def _flushed(target: int) -> int:
    os.fsync(target)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.close(_flushed(descriptor))


def main() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        folders, out = [Path(folder) for folder in asked["folders"]], Path(asked["out"])
        if asked["work"] == "ready":  # Everything imported, so that memory at rest is what stays.
            for module in IMPORTS.values():
                import_module(module)
            patch_for(folders[0]).plan(folders[0])
            answer = 0.0
        else:
            os.sync()
            begun = time.perf_counter()
            WORKS[asked["work"]](folders, out)
            answer = time.perf_counter() - begun
            shutil.rmtree(out)
        sys.stdout.write(json.dumps({"seconds": answer}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
