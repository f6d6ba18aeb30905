"""An adapter folder as PEFT writes it: configuration, factors, model card, and our manifest beside them.

lora_alpha equals the rank of every target, so the scale that B A is multiplied with is 1, also for readers that know no
`rank_pattern`. Factors are written as they come, so memory holds one target at a time; the folder appears whole or not
at all.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from edits.checkpoint.folder import sync_folder
from edits.lora.targets import Place
from steer.adapters import CONFIG, PREFIX, WEIGHTS
from steer.artifacts import code_version
from steer.errors import SteerError
from steer.files import MODE
from steer.tables import table

if TYPE_CHECKING:
    import pandas

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
MANIFEST = "steer/adapter.json"
SHOWN = 8


@dataclass(frozen=True)
class Row:
    """One matrix that the adapter changes.

    Attributes:
        matrix: its logical name.
        rank: of its factors.
        norm: Frobenius norm of the change that was wanted.
        relative: that norm over the norm of the matrix.
        error: Frobenius norm of what B A, as stored, lacks of it, over `norm`.
    """

    matrix: str
    rank: int
    norm: float
    relative: float
    error: float


@dataclass(frozen=True)
class Left:
    """One tensor that differs and is not in the adapter.

    Attributes:
        tensor: its name.
        norm: Frobenius norm of its difference.
        relative: that norm over the norm of the tensor.
        why: why it cannot be in an adapter.
    """

    tensor: str
    norm: float
    relative: float
    why: str


@dataclass(frozen=True)
class Adapter:
    """A written adapter.

    Attributes:
        path: the folder.
        base: the model that it is for.
        rows: what it changes.
        left: what differs between two checkpoints and is not in it; empty for an export.
        notes: what else the reader should know.
    """

    path: Path
    base: str
    rows: tuple[Row, ...]
    left: tuple[Left, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """What is missing over what was wanted, Frobenius norms over all tensors, those left out included."""
        out = sum(row.norm**2 for row in self.left)
        wanted = sum(row.norm**2 for row in self.rows) + out
        return float(((sum((row.error * row.norm) ** 2 for row in self.rows) + out) / wanted) ** 0.5) if wanted else 0.0

    @property
    def ranks(self) -> dict[int, int]:
        """How many matrices have each rank."""
        return dict(sorted(Counter(row.rank for row in self.rows).items()))

    def __str__(self) -> str:
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in self.ranks.items())
        lines = [f"adapter {self.path}: {len(self.rows)} matrices ({ranks}), relative error {self.error:.2g}"]
        shown = self.left[:SHOWN]
        lines += [f"  not in it: {row.tensor}, relative difference {row.relative:.2g}: {row.why}" for row in shown]
        if len(self.left) > SHOWN:
            lines.append(f"  and {len(self.left) - SHOWN} more that are not in it, all in {MANIFEST}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "adapter": str(self.path), "base": self.base, "error": self.error,
            "rows": [asdict(row) for row in self.rows], "left": [asdict(row) for row in self.left], "notes": list(self.notes),
        }  # fmt: skip

    def frame(self) -> pandas.DataFrame:
        """Return one row per matrix.

        Raises:
            SteerError: pandas is not installed.
        """
        return table([asdict(row) for row in self.rows], [each.name for each in fields(Row)])

    def _repr_html_(self) -> str:
        names = [each.name for each in fields(Row)]
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = [
            [row.matrix, row.rank, f"{row.norm:.4g}", f"{row.relative:.3g}", f"{row.error:.2g}"] for row in self.rows
        ]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table><tr>{head}</tr>{body}</table>"


@dataclass
class Writing:
    """Factors on their way to the disk: the stream of their bytes, and where each lies in it."""

    stream: IO[bytes]
    dtype: str
    parts: list[tuple[Place, str, tuple[int, ...], int, int]] = field(default_factory=list)
    ranks: dict[Place, int] = field(default_factory=dict)

    def add(self, place: Place, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], rank: int) -> None:
        """Write one pair of factors; of experts, the pair that they share."""
        self.ranks[place] = rank
        for letter, factor in (("A", A), ("B", B)):
            plain = factor.detach().to("cpu", DTYPES[self.dtype]).contiguous()
            start = self.stream.tell()
            self.stream.write(plain.reshape(-1).view(torch.uint8).numpy().data)
            self.parts.append((place, letter, tuple(plain.shape), start, self.stream.tell()))

    def header(self) -> bytes:
        """Return the header of the safetensors file."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for place, letter, shape, start, end in self.parts:
            described = {"dtype": WORDS[self.dtype], "shape": list(shape), "data_offsets": [start, end]}
            entries[PREFIX + _key(place, letter, self.ranks)] = described
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def config(self, base: str) -> dict[str, Any]:
        """Return the adapter's configuration."""
        common = max(Counter(self.ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
        others = {place.target: rank for place, rank in sorted(self.ranks.items()) if rank != common}
        modules = sorted(place.target for place in self.ranks if place.kind in ("linear", "embedding"))
        parameters = sorted(place.target for place in self.ranks if place.kind in ("weight", "experts"))
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": modules, "target_parameters": parameters or None,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
            "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip


def _key(place: Place, letter: str, targets: Mapping[Place, int]) -> str:
    """Return the name of a factor. Of two parameters of one module, the first one is wrapped first and lies inside."""
    if place.kind == "embedding":
        return f"{place.path}.lora_embedding_{letter}"
    both = place.parameter == "gate_up_proj" and any(
        other.path == place.path and other.parameter == "down_proj" for other in targets
    )
    return f"{place.path}{'.base_layer' if both else ''}.lora_{letter}.weight"


@contextmanager
def writing(out: Path, dtype: str) -> Iterator[tuple[Path, Writing]]:
    """Yield a folder that becomes `out` when the block ends well, and what takes the factors.

    Raises:
        SteerError: `out` exists, or the dtype is unknown.
        OSError: the disk refuses.
    """
    if dtype not in DTYPES:
        raise SteerError(f"the factors are to be written as {dtype!r}", f"one of {', '.join(DTYPES)}")
    if os.path.lexists(out):
        raise SteerError(f"the output {out} exists already", "a name that is free", "Choose another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        with (partial / "factors").open("w+b") as stream:
            yield partial, Writing(stream, dtype)
        (partial / "factors").unlink()
        partial.chmod(0o755)
        for folder in (partial / "steer", partial):
            sync_folder(folder)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def seal(partial: Path, found: Writing, adapter: Adapter, recipe: Mapping[str, Any]) -> None:
    """Write configuration, factors, manifest and card of an adapter whose factors are all there.

    Args:
        partial: the folder under its temporary name.
        found: the factors.
        adapter: what is to be said of it.
        recipe: how it was made; JSON values only.
    """
    with (partial / WEIGHTS).open("wb") as file:
        file.write(found.header())
        found.stream.seek(0)
        shutil.copyfileobj(found.stream, file, 1 << 24)
    story = {"code_version": code_version(), **recipe, **adapter.to_dict(), "adapter": adapter.path.name}
    (partial / "steer").mkdir()
    texts = {
        CONFIG: json.dumps(found.config(adapter.base), indent=2) + "\n",
        MANIFEST: json.dumps(story, indent=1) + "\n",
        "README.md": _card(adapter, recipe),
    }
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    for path in (partial / name for name in (WEIGHTS, *texts)):
        path.chmod(MODE)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _card(adapter: Adapter, recipe: Mapping[str, Any]) -> str:
    said = "\n".join(f"* {key}: {value['name'] if isinstance(value, dict) else value}" for key, value in recipe.items())
    first, *more = str(adapter).splitlines()
    listed = "".join(f"\n* {line.strip()}" for line in more)
    return f"""---
base_model: {adapter.base}
library_name: peft
tags: [lora, reasoning-steer]
---

# {adapter.path.name}

A LoRA adapter made by reasoning-steer, not trained: {first.partition(": ")[2]}.
`PeftModel.from_pretrained(base, folder)` runs it; lora_alpha equals the rank, so B A is added as it is. What it changes,
matrix by matrix, stands in `{MANIFEST}`.

{said}{listed}
"""
