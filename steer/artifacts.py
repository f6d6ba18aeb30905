"""Artifacts: tensors with the story of how they were made, in one safetensors file (DESIGN §5).

The file's metadata hold one entry, `steer`, a JSON block with exactly the keys of `PROVENANCE`. Whatever was not
filled in is null. Unknown versions, kinds and keys are refused; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import SteerError
from steer.files import replacing
from steer.identity import ModelIdentity, canonical, digest, known_keys

FORMAT_VERSION = 1
KINDS = ("direction", "scores", "expert_scores", "steering", "patch", "summary", "sae")
GIVEN = ("model", "site", "convention", "data_hash", "data_count", "options", "seed", "parents", "content")
FILLED = ("format_version", "kind", "code_version", "dtype", "tensors_id")
PROVENANCE = FILLED + GIVEN
WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds.

    Attributes:
        kind: one of `KINDS`.
        tensors: by name, on the CPU, in the dtype they were written in.
        provenance: exactly the keys of `PROVENANCE`.
    """

    kind: str
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]

    @property
    def model(self) -> ModelIdentity | None:
        """The model it was made for, where the file says so."""
        stored = self.provenance["model"]
        return None if stored is None else ModelIdentity.from_dict(stored)


def provenance(
    *,
    model: ModelIdentity | None = None,
    site: str | None = None,
    convention: str | None = None,
    data_hash: str | None = None,
    data_count: int | None = None,
    options: Mapping[str, object] | None = None,
    seed: int | None = None,
    parents: Sequence[str] = (),
    content: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Return the block of provenance that `write` takes.

    Args:
        model: the model it was made from.
        site: where its vectors live.
        convention: what the numbers mean, such as "mean(long) - mean(short), raw".
        data_hash: hash of the traces or summary it was made from.
        data_count: how many traces went in.
        options: every option that shaped it.
        seed: of its random choices.
        parents: fingerprints of the artifacts it was made from.
        content: what the kind needs to read its tensors, such as layer numbers.
    """
    return {
        "model": None if model is None else model.to_dict(),
        "site": site,
        "convention": convention,
        "data_hash": data_hash,
        "data_count": data_count,
        "options": dict(options or {}),
        "seed": seed,
        "parents": list(parents),
        "content": dict(content or {}),
    }


def tensors_id(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of names, dtypes, shapes and bytes; the order of the mapping does not matter."""
    return _described(tensors)[0]


def _described(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Return the hash and what each tensor is; every tensor is looked up once, and let go before the next."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def parts() -> Iterator[bytes | memoryview]:
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            found[name] = (tensor.dtype, tuple(tensor.shape))
            yield canonical([name, str(tensor.dtype), list(tensor.shape)]).encode()
            yield _bytes(tensor)

    return digest(parts()), found


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


@cache
def code_version() -> str:
    """Return the version of the installed distribution, or "unknown" when run from a bare folder."""
    try:
        return metadata.version("reasoning-steer")
    except metadata.PackageNotFoundError:
        return "unknown"


def write(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write an artifact, whole or not at all, with mode 0644.

    Args:
        path: a name ending in `.safetensors`.
        kind: one of `KINDS`.
        tensors: by name; written as they are, one after the other, so that a mapping may make each when it is asked
            for it. Each is asked for twice: for the hash, which stands in front, and to be written.
        provenance: keys among `GIVEN`, as the function `provenance` makes them; missing ones become null.
        overwrite: allow `path` to exist.

    Raises:
        SteerError: the suffix, the kind or a key is not known, or `path` exists.
        OSError: the disk or the permissions refuse.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise SteerError(
            f"the name {path.name!r} does not end in .safetensors",
            "a .safetensors file",
            "Add the ending, so that others see what the file is",
        )
    _check_kind(kind, str(path))
    known_keys(provenance, GIVEN, f"the provenance of {path}")
    identity, found = _described(tensors)
    block = {key: provenance.get(key) for key in GIVEN} | {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "code_version": code_version(),
        "dtype": ",".join(sorted({str(dtype).removeprefix("torch.") for dtype, _ in found.values()})),
        "tensors_id": identity,
    }
    names = sorted(found, key=lambda name: (-found[name][0].itemsize, name))  # Each begins at a multiple of its size.
    with replacing(path, overwrite) as partial, partial.open("wb") as stream:
        stream.write(_header({name: found[name] for name in names}, {"steer": canonical(block)}))
        for name in names:
            stream.write(_bytes(tensors[name]))


def _header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file with these tensors in this order."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(path: str | Path, kind: str | None = None, *, mapped: bool = False) -> Artifact:
    """Read an artifact and check that it is whole.

    Args:
        path: file written by `write`.
        kind: what it has to be; None takes any known kind.
        mapped: leave the tensors in the file, which the system maps into memory as they are read, instead of copying
            them; for files of gigabytes, which must then stay as they are.

    Raises:
        SteerError: no such file, a pickle, a damaged or foreign safetensors file, an unknown version, kind or key, or
            another kind.
    """
    path = Path(path)
    block = read_block(path)
    if kind is not None and block["kind"] != kind:
        raise SteerError(
            f"{path} is of kind {block['kind']!r}",
            f"kind {kind!r}",
            "Give another file, or use this one for what it is",
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a mapping
    if tensors_id(tensors) != block["tensors_id"]:
        raise SteerError(
            f"{path} is damaged: its tensors do not match the hash in its header",
            "the bytes that were written",
            "Copy or make the file again",
        )
    kept = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    return Artifact(block["kind"], kept, block)


def read_block(path: Path) -> dict[str, Any]:
    """Return the provenance of an artifact from its header alone; errors as `read`."""
    if not path.is_file():
        raise SteerError(f"there is no file {path}", "an artifact written by this toolkit", "Check the path")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
    except SafetensorError as error:
        with path.open("rb") as stream:
            pickled = stream.read(4).startswith(_PICKLES)
        if pickled:
            raise SteerError(
                f"{path} is a pickle, which can run code when it is read",
                "a safetensors file",
                "Convert it with the program that made it; it is never opened here",
            ) from error
        raise SteerError(
            f"{path} is not a whole safetensors file ({error})",
            "an artifact written by this toolkit",
            "Copy or make the file again",
        ) from error
    if "steer" not in stored:
        raise SteerError(
            f"{path} is a safetensors file without our provenance",
            "an artifact written by this toolkit",
            "Make it with `steer probe` or `steer patch`",
        )
    return _checked_block(stored["steer"], path)


def _checked_block(text: str, path: Path) -> dict[str, Any]:
    try:
        block = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SteerError(
            f"the provenance of {path} is not JSON ({error})", "the block that was written", "Make the file again"
        ) from error
    if not isinstance(block, dict):
        raise SteerError(
            f"the provenance of {path} is a {type(block).__name__}", "a JSON object", "Make the file again"
        )
    version = block.get("format_version")
    if version != FORMAT_VERSION:
        raise SteerError(
            f"{path} has format version {version!r}",
            f"version {FORMAT_VERSION}",
            "Read it with the version of reasoning-steer that wrote it, or make it again",
        )
    known_keys(block, PROVENANCE, f"the provenance of {path}")
    missing = [key for key in PROVENANCE if key not in block]
    if missing:
        raise SteerError(
            f"the provenance of {path} lacks {', '.join(missing)}", "every key of the format", "Make the file again"
        )
    _check_kind(block["kind"], str(path))
    return block


def _check_kind(kind: object, where: str) -> None:
    if kind not in KINDS:
        raise SteerError(
            f"{where} is of the unknown kind {kind!r}",
            f"one of {', '.join(KINDS)}",
            "Update reasoning-steer, or check the file",
        )


def kind_of(path: str | Path) -> str:
    """Say what a file or folder is: one of `KINDS`, or `adapter` for a PEFT folder; reads headers only.

    A steering is known by its `.yaml`.

    Raises:
        SteerError: it is none of these.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "adapter"
        raise SteerError(
            f"the folder {path} has no adapter_config.json",
            "an adapter, a steering (.yaml) or a patch (.safetensors)",
            "Give a file, or use the folder as MODEL if it is a checkpoint",
        )
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return "steering"
    return str(read_block(path)["kind"])
