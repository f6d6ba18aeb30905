"""The manifest of a merged checkpoint: `steer/manifest.yaml`, with the recipe beside it as `steer/recipe.yaml`.

It holds no time and no random number, so an interrupted and resumed merge writes the same bytes as one left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from edits.checkpoint.folder import OURS
from edits.checkpoint.manifest import DUMPER, LOADER
from steer.artifacts import code_version
from steer.errors import SteerError
from steer.files import write_text
from steer.identity import known_keys

FORMAT, KIND = 1, "merge"
MANIFEST = f"{OURS}/manifest.yaml"
RECIPE = f"{OURS}/recipe.yaml"


@dataclass(frozen=True)
class MergedModel:
    """One model that went in.

    Attributes:
        name: in the recipe.
        folder: where it was.
        family: its model type.
        tensors, bytes: of its weights.
        hashes: of its weight files, by name, where a hub cache says them.
    """

    name: str
    folder: str
    family: str
    tensors: int
    bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class MergedTensor:
    """What became of one tensor.

    Attributes:
        name: on disk.
        file: that holds it.
        method: of the merge; "cast" where one model's numbers were stored in another dtype. (Tensors whose bytes one
            model gave as they were are listed by name alone, in `kept`.)
        models: that counted, as the recipe names them.
        after: hash of its bytes.
        numbers: how many it has.
        changed: how many differ in their bits from the layout's; null where that one was not read or has another dtype.
        not_finite: infinite numbers and NaN.
        wanted: Frobenius norm of the wanted change of the base; null for linear and slerp.
        survived: norm of the stored change over `wanted`; null where nothing was wanted.
        cosine: between the two changes.
        filled: rows of tokens that were left out or filled, over all models.
        angle: cosine between the two tensors of slerp.
        straight: whether slerp was linear interpolation, since they are nearly parallel.
        ties: entries of the magnitude at TIES' edge that were dropped while others of it were kept.
    """

    name: str
    file: str
    method: str
    models: list[str]
    after: str
    numbers: int
    changed: int | None
    not_finite: int
    wanted: float | None
    survived: float | None
    cosine: float | None
    filled: int
    angle: float | None = None
    straight: bool | None = None
    ties: int | None = None


@dataclass(frozen=True)
class MergeManifest:
    """What `merge` did.

    Attributes:
        format, kind: of this layout; "merge".
        code_version: of this toolkit.
        method: of the merge.
        models: that went in, the one whose layout is followed first.
        coverage: what was merged, counted.
        notes: what a reader might not expect.
        tensors: merged ones, in the order of the layout.
        kept: by model, the names of tensors whose bytes stayed as they are there.
        key: what the bytes follow from.
    """

    method: str
    models: tuple[MergedModel, ...]
    coverage: str
    notes: list[str]
    tensors: tuple[MergedTensor, ...]
    kept: dict[str, list[str]]
    key: str
    format: int = FORMAT
    kind: str = KIND
    code_version: str = ""

    def write(self, folder: Path, recipe: str) -> None:
        """Write the manifest and the recipe into a folder, in place of what may be there."""
        data = asdict(self) | {"code_version": code_version()}
        data["models"], data["tensors"] = list(data["models"]), list(data["tensors"])
        write_text(folder / RECIPE, recipe, overwrite=True)
        text = yaml.dump(data, Dumper=DUMPER, sort_keys=False, width=4096, allow_unicode=True)
        write_text(folder / MANIFEST, text, overwrite=True)

    @classmethod
    def read(cls, folder: Path) -> MergeManifest:
        """Read the manifest of a merged checkpoint.

        Raises:
            SteerError: there is none, it is another's, damaged, of an unknown version or with unknown keys.
        """
        path = folder / MANIFEST
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER) if path.is_file() else None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SteerError(
                f"{path} is damaged ({type(error).__name__})", "the manifest that was written", "Merge again"
            ) from error
        if not isinstance(data, dict) or (data.get("kind"), data.get("format")) != (KIND, FORMAT):
            raise SteerError(
                f"{folder} has no manifest of a merge in format {FORMAT}",
                "a checkpoint written by `steer merge`",
                "Give the folder that `steer merge` wrote",
            )
        data["models"] = tuple(_record(MergedModel, entry, path) for entry in _listed(data, "models", path))
        data["tensors"] = tuple(_record(MergedTensor, entry, path) for entry in _listed(data, "tensors", path))
        return _record(cls, data, path)


def _listed(data: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise SteerError(f"{path} has no list of {name}", "the manifest that was written", "Merge again")
    return found


Kind = TypeVar("Kind", MergedModel, MergedTensor, MergeManifest)


def _record(kind: type[Kind], data: Mapping[str, Any], path: Path) -> Kind:
    names = [field.name for field in fields(kind)]
    known_keys(data, names, str(path))
    missing = [name for name in names if name not in data]
    if missing:
        raise SteerError(f"{path} lacks {', '.join(missing)}", "the manifest that was written", "Merge again")
    return kind(**data)
