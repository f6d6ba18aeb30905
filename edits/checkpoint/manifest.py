"""The manifest of an edited checkpoint: `steer/manifest.yaml`, beside `steer/patch.safetensors` and the undo.

It lies in a subfolder because engines load every `*.safetensors` that lies beside the shards. It holds no time and
no random number, so an interrupted and resumed run writes the same bytes as one that was left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from edits.checkpoint.folder import OURS
from steer.artifacts import code_version
from steer.errors import SteerError
from steer.files import write_text
from steer.identity import known_keys

FORMAT = 1
MANIFEST = f"{OURS}/manifest.yaml"
PATCH = f"{OURS}/patch.safetensors"
UNDO = f"{OURS}/undo"


@dataclass(frozen=True)
class TensorRecord:
    """What happened to one tensor.

    Attributes:
        name: on disk.
        file: that holds it.
        matrix: its logical name.
        before: hash of its bytes in the base.
        after: hash of its bytes here.
        wanted: Frobenius norm of the wanted change.
        survived: norm of the stored change over `wanted`; null where nothing was wanted.
        cosine: between the two changes; null where one is zero.
        columns: half-open ranges of columns that may differ, as [[start, end], …].
    """

    name: str
    file: str
    matrix: str
    before: str
    after: str
    wanted: float
    survived: float | None
    cosine: float | None
    columns: list[list[int]]


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint: its name here, its bytes, whether it holds a touched tensor, its hash in the base if known."""

    name: str
    bytes: int
    touched: bool
    base_hash: str | None


@dataclass(frozen=True)
class Manifest:
    """What `apply` did.

    Attributes:
        format: version of this layout.
        code_version: of this toolkit.
        base: absolute path of the checkpoint that was patched.
        family: model type of the base.
        shape_id: hash of its anatomy's numbers.
        patch: fingerprint of the patch, which lies beside.
        coverage: what was touched, counted against what exists.
        undo: "base" (needs the base), or "slices" (the original columns lie in `steer/undo`).
        tensors: touched ones, in order of layer.
        files: all files of the base, under their names here.
    """

    base: str
    family: str
    shape_id: str
    patch: str
    coverage: str
    undo: str
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    format: int = FORMAT
    code_version: str = ""

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, in place of one that may be there."""
        data = asdict(self) | {"code_version": code_version()}
        data["tensors"], data["files"] = list(data["tensors"]), list(data["files"])
        text = yaml.safe_dump(data, sort_keys=False, width=4096, allow_unicode=True)
        write_text(folder / MANIFEST, text, overwrite=True)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an edited checkpoint.

        Raises:
            SteerError: there is none, it is damaged, or of an unknown version or with unknown keys.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise SteerError(
                f"{folder} has no {MANIFEST}",
                "a checkpoint written by `steer apply`",
                "Give the folder that `steer apply` wrote",
            )
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SteerError(
                f"{path} is damaged ({type(error).__name__})", "the manifest that was written", "Apply the patch again"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise SteerError(
                f"{path} has format {data.get('format') if isinstance(data, dict) else None!r}",
                f"format {FORMAT}",
                "Read it with the version that wrote it",
            )
        data["tensors"] = tuple(_record(TensorRecord, entry, path) for entry in data.get("tensors", []))
        data["files"] = tuple(_record(FileRecord, entry, path) for entry in data.get("files", []))
        return _record(cls, data, path)


Kind = TypeVar("Kind", TensorRecord, FileRecord, Manifest)


def _record(kind: type[Kind], data: Mapping[str, Any], path: Path) -> Kind:
    names = [field.name for field in fields(kind)]
    known_keys(data, names, str(path))
    missing = [name for name in names if name not in data]
    if missing:
        raise SteerError(f"{path} lacks {', '.join(missing)}", "the manifest that was written", "Apply the patch again")
    return kind(**data)
