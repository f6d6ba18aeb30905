"""What a patch would do to a checkpoint, read from headers alone: names, shapes, dtypes, coverage, bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edits.checkpoint import created, quantised, shown
from edits.checkpoint.folder import Progress
from edits.checkpoint.gather import gathered
from edits.checkpoint.quantised import QUANTISED_REMEDY as QUANTISED_REMEDY
from edits.checkpoint.source import SourceFile as SourceFile
from edits.checkpoint.source import source_files as source_files
from edits.checkpoint.touched import FLOATS as FLOATS
from edits.checkpoint.touched import Touched as Touched
from edits.checkpoint.touched import box_numbers
from steer.anatomy.headers import BYTES, Headers, read_headers
from steer.anatomy.record import Record, read_record
from steer.anatomy.resolve import Anatomy, resolve
from steer.conflicts import Conflicts, conflicts
from steer.errors import SteerError
from steer.identity import ModelIdentity, check_same, shape_id
from steer.patches import Patch

if TYPE_CHECKING:
    from edits.checkpoint.apply import Edited

DTYPES = {"float32": "F32"}


@dataclass(frozen=True, eq=False)
class Plan:
    """What `apply` would do. Prints as a table.

    Attributes:
        patch: the change; several are composed.
        headers: of the base.
        anatomy: what the base calls its parts; None for a family without a record, where tensors go by their own names.
        touched: tensors that change or are made, in order of layer.
        widened: tensors of which only the dtype changes.
        config: dotted keys of config.json that are set.
        files: every file of the base.
        conflicts: matrices that are touched more than once.
        dtype: that 16-bit tensors are widened to; None leaves each as it is.
        force_base: go on although touched tensors are not those that the patch was made for.
        untie: the vocabulary head becomes a tensor of its own.
    """

    patch: Patch
    headers: Headers
    anatomy: Anatomy | None
    touched: tuple[Touched, ...]
    widened: tuple[Touched, ...]
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    conflicts: Conflicts
    dtype: str | None = None
    force_base: bool = False
    untie: bool = False
    _sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The base."""
        return self.headers.folder

    @property
    def created(self) -> tuple[Touched, ...]:
        """Tensors that the base lacks."""
        return tuple(tensor for tensor in self.touched if tensor.created)

    @property
    def made(self) -> list[str]:
        """What is made new, and why, in words."""
        return shown.made(self)

    @property
    def bytes_to_write(self) -> int:
        """Size of the output without manifest and undo."""
        more = sum(tensor.size - self._stored(tensor) for tensor in (*self.touched, *self.widened))
        return sum(file.size for file in self.files) + more

    @property
    def bytes_edited(self) -> int:
        """Size of the tensors that change, as they will be."""
        return sum(tensor.size for tensor in (*self.touched, *self.widened))

    @property
    def bytes_undo(self) -> int:
        """Size of the original numbers that `keep_undo` stores."""
        return sum(undo_bytes(tensor) for tensor in self.touched)

    def _stored(self, tensor: Touched) -> int:
        return 0 if tensor.created or tensor.entry is None else tensor.entry.end - tensor.entry.start

    @property
    def coverage(self) -> str:
        """What is touched, counted against what exists."""
        return shown.coverage(self)

    @property
    def loads(self) -> dict[str, str]:
        """Where the result will load."""
        return shown.loads(self)

    def apply(
        self,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        link: bool = False,
        keep_undo: bool = False,
        hash_all: bool = False,
        progress: Progress | None = None,
    ) -> Edited:
        """Write the edited checkpoint; see `edits.checkpoint.apply.apply`."""
        from edits.checkpoint.apply import apply

        options = {"resume": resume, "link": link, "keep_undo": keep_undo, "hash_all": hash_all}
        return apply(self, Path(out), progress=progress, **options)

    def rows(self) -> list[tuple[str, ...]]:
        """One row per touched tensor: matrix, heads, tensor, file, dtype, shape."""
        return shown.rows(self)

    def summary(self) -> list[str]:
        """The plan in sentences."""
        return shown.summary(self)

    def __str__(self) -> str:
        return shown.text(self)

    def _repr_html_(self) -> str:
        return shown.markup(self)


def undo_bytes(tensor: Touched) -> int:
    """Size of the original numbers of a tensor that may differ."""
    width = BYTES[tensor.entry.dtype] if tensor.entry is not None else 0
    return sum(map(box_numbers, tensor.boxes)) * width


def plan(
    patch: Patch | Sequence[Patch],
    folder: str | os.PathLike[str],
    anatomy: str | os.PathLike[str] | Record | None = None,
    *,
    dtype: str | None = None,
    force_base: bool = False,
    untie: bool = False,
) -> Plan:
    """Match a patch with a checkpoint on disk; reads headers, loads and writes nothing.

    Args:
        patch: what to do; several are composed in their order.
        folder: a Hugging Face checkpoint in safetensors, one file or shards, links of a hub cache too.
        anatomy: your own record, or its file, for a family that has none.
        dtype: "float32" widens every float tensor of 16 bits, so that a small change survives; None leaves each as it is.
        force_base: let `apply` go on where touched tensors are not those that the patch was made for.
        untie: give a tied model a vocabulary head of its own, a copy of the embedding before the patch.

    Raises:
        SteerError: no such checkpoint; a family without a record; another model's shape; a touched tensor is missing,
            quantised, of a dtype that cannot be edited, or does not fit the operations; a bias that the family cannot
            load; a dtype other than float32.
    """
    headers = read_headers(Path(folder))
    patches = (patch,) if isinstance(patch, Patch) else tuple(patch)
    whole = patches[0] if len(patches) == 1 else Patch.compose(*patches)
    record = anatomy if anatomy is None or isinstance(anatomy, Record) else read_record(Path(anatomy))
    found = _anatomy(headers, record, whole)
    if found is not None:
        check_same(
            whole.model, ModelIdentity(str(headers.folder), found.family, shape_id(found.numbers())), "the patch"
        )
    wide = _dtype(dtype, headers)
    touched, config = gathered(whole, headers, found, wide, untie)
    names = {tensor.name for tensor in touched}
    widened = tuple(
        Touched(name, entry.file, wide, entry.shape, entry)
        for name, entry in headers.tensors.items()
        if wide is not None and name not in names and entry.dtype in FLOATS and BYTES[entry.dtype] < BYTES[wide]
    )
    if wide is not None and dtype is not None:
        config |= created.dtype_changes(headers.config, dtype)
    config = {key: value for key, value in (config | dict(whole.config)).items() if _differs(headers, key, value)}
    created.changed_config(headers.config, config)
    files = source_files(headers.folder)
    return Plan(
        whole, headers, found, tuple(touched), widened, config, files, conflicts(patches), wide, force_base, untie
    )


def _differs(headers: Headers, key: str, value: object) -> bool:
    return created.changed_config(headers.config, {key: value}) != headers.config


def _dtype(dtype: str | None, headers: Headers) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise SteerError(
            f"the output dtype is {dtype!r}", "float32, or none to keep each tensor's", "Leave --dtype out"
        )
    if packed := quantised.packed(headers.tensors):
        raise SteerError(
            f"{headers.folder} is quantised ({packed[0]}), and its engines want each tensor in its own dtype",
            "an unquantised checkpoint for --dtype",
            "Leave --dtype out",
        )
    return DTYPES[dtype]


def _anatomy(headers: Headers, record: Record | None, patch: Patch) -> Anatomy | None:
    """The base's anatomy; None where the patch names tensors alone and there is no record of the family."""
    packed = quantised.packed(headers.tensors)
    try:
        return resolve(headers.config, quantised.stand_ins(headers) if packed else headers.shapes, record)
    except SteerError as error:
        if record is None and patch.model is None and all(matrix.raw for matrix in patch.matrices):
            return None
        if not packed:
            raise
        raise SteerError(
            f"{headers.folder} is quantised: it holds {packed[0]} and {len(packed) - 1} tensors like it",
            "plain weights",
            QUANTISED_REMEDY,
        ) from error
