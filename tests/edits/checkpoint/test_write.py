"""The writer of checkpoints, read back with the library and compared byte for byte with what was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edits.checkpoint.folder import partial_name
from edits.checkpoint.source import source_files
from edits.checkpoint.stream import Bytes, Json
from edits.checkpoint.write import OutTensor, write_checkpoint
from steer.anatomy.headers import Entry, read_headers
from steer.errors import SteerError
from tests.edits.material import contents

FIRST = {"a.x": torch.arange(12.0).reshape(3, 4).bfloat16(), "a.y": torch.arange(5).float()}
SECOND = {"b.x": torch.arange(6).half(), "b.z": torch.zeros(0)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards with an index, and files of other kinds."""
    folder = tmp_path / "base"
    (folder / "deep").mkdir(parents=True)
    table: dict[str, str] = {}
    total = 0
    for number, part in enumerate((FIRST, SECOND), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt", "by": "a test"})
        table |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total, "total_parameters": 23, "other": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "custom.py").write_text("x = 1\n")
    return folder


def kept(folder: Path) -> dict[str, OutTensor]:
    return {
        name: OutTensor(name, entry.dtype, entry.shape, entry.file, kept=(folder / entry.file, entry))
        for name, entry in read_headers(folder).tensors.items()
    }


def made(name: str, tensor: torch.Tensor, file: str, dtype: str, calls: list[str] | None = None) -> OutTensor:
    data: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()

    def make() -> Iterator[Bytes]:
        if calls is not None:
            calls.append(name)
        buffer = np.empty(7, dtype=np.uint8)
        for start in range(0, data.size, 7):  # One buffer for all pieces: a piece is done with before the next.
            piece = buffer[: min(7, data.size - start)]
            piece[:] = data[start : start + 7]
            yield piece

    after = "sha256:" + hashlib.sha256(data.data).hexdigest()
    return OutTensor(name, dtype, tuple(tensor.shape), file, make=make, record=lambda: {"after": after})


def write(out: Path, tensors: Mapping[str, OutTensor], folder: Path, **options: Any) -> dict[str, Json]:
    found: dict[str, Json] = {}
    options = {"key": {"k": 1}, "sealed": lambda partial: False, **options}
    seal: Callable[[Path, Mapping[str, Json]], None] = lambda partial, records: found.update(records)  # noqa: E731
    write_checkpoint(out, list(tensors.values()), source_files(folder), seal=seal, **options)
    return found


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return found


def test_kept_tensors_alone_are_a_copy(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "out", kept(base), base)
    assert contents(tmp_path / "out") == contents(base)


def test_a_made_tensor_is_spliced_into_its_shard(base: Path, tmp_path: Path) -> None:
    new = torch.full((3, 4), 7.0).bfloat16()
    file = "model-00001-of-00002.safetensors"
    records = write(tmp_path / "out", kept(base) | {"a.x": made("a.x", new, file, "BF16")}, base)
    entry = read_headers(base).tensors["a.x"]
    old, now = contents(base), contents(tmp_path / "out")
    assert (
        now.pop(file) == old[file][: entry.start] + new.view(torch.uint8).numpy().tobytes() + old.pop(file)[entry.end :]
    )
    assert now == old and list(records[file]["tensors"]) == ["a.x"]


def test_added_and_recast_tensors_get_a_new_header_and_index(base: Path, tmp_path: Path) -> None:
    file = "model-00002-of-00002.safetensors"
    wide = made("b.x", SECOND["b.x"].float(), file, "F32")
    added = made("b.bias", torch.ones(3).bfloat16(), file, "BF16")
    write(tmp_path / "out", kept(base) | {"b.x": wide, "b.bias": added}, base)
    found = read(tmp_path / "out")
    expected = FIRST | SECOND | {"b.x": SECOND["b.x"].float(), "b.bias": torch.ones(3).bfloat16()}
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    with safe_open(tmp_path / "out" / file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "a test"}
    for entry in read_headers(tmp_path / "out").tensors.values():
        assert entry.start % {"F32": 4, "BF16": 2, "F16": 2}[entry.dtype] == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["b.bias"] == file
    size = sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"] == {"total_size": size, "total_parameters": 26, "other": 1}
    first = "model-00001-of-00002.safetensors"
    assert (tmp_path / "out" / first).read_bytes() == (base / first).read_bytes()


def test_tensors_may_come_from_elsewhere_and_shards_may_change(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"b.x": SECOND["b.x"] + 1, "q": torch.ones(3)}, other / "model.safetensors")
    there = kept(other)["b.x"]
    moved = OutTensor("b.x", "F16", (6,), "model-00002-of-00002.safetensors", kept=there.kept)
    write(tmp_path / "out", kept(base) | {"b.x": moved}, base)
    assert torch.equal(read(tmp_path / "out")["b.x"], SECOND["b.x"] + 1)
    one = {name: OutTensor(name, t.dtype, t.shape, "model.safetensors", kept=t.kept) for name, t in kept(base).items()}
    files = [file for file in source_files(base) if not file.name.startswith("model")]
    write_checkpoint(
        tmp_path / "one", list(one.values()), files, key={}, seal=lambda p, r: None, sealed=lambda p: False
    )
    assert sorted(contents(tmp_path / "one")) == ["config.json", "deep/custom.py", "model.safetensors"]
    assert all(torch.equal(read(tmp_path / "one")[name], tensor) for name, tensor in (FIRST | SECOND).items())


def test_texts_replace_files_and_every_file_can_be_hashed(base: Path, tmp_path: Path) -> None:
    texts = {"config.json": '{"a": 1}', "README.md": "# card\n"}
    for link in (False, True):
        records = write(tmp_path / str(link), kept(base), base, texts=texts, hash_all=True, link=link)
        found = contents(tmp_path / str(link))
        assert found["config.json"] == b'{"a": 1}' and found["README.md"] == b"# card\n"
        assert {n: r["sha256"] for n, r in records.items()} == {
            n: hashlib.sha256(d).hexdigest() for n, d in found.items()
        }
        shared = (base / "deep/custom.py").samefile(tmp_path / str(link) / "deep/custom.py")
        assert shared == link


def test_progress_adds_up_and_resume_makes_nothing_twice(base: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    first = made("a.x", FIRST["a.x"] + 1, files[0], "BF16", calls)
    second = made("b.x", SECOND["b.x"] + 1, files[1], "F16", calls)

    def broken() -> Iterator[Bytes]:
        yield np.zeros(2, dtype=np.uint8)
        raise OSError(28, "No space left on device")

    plan = kept(base) | {"a.x": first, "b.x": OutTensor("b.x", "F16", (6,), files[1], make=broken)}
    with pytest.raises(SteerError, match="No space"):
        write(tmp_path / "out", plan, base)
    assert calls == ["a.x"] and partial_name(tmp_path / "out").is_dir()
    counted: list[int] = []
    write(tmp_path / "out", plan | {"b.x": second}, base, resume=True, progress=counted.append)
    assert calls == ["a.x", "b.x"]
    assert sum(counted) == sum(map(len, contents(tmp_path / "out").values()))
    write(tmp_path / "again", plan | {"b.x": second}, base)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_links_are_never_written_through(base: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial = partial_name(tmp_path / "out")

    def stop(partial: Path, records: Mapping[str, Json]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SteerError):
        write_checkpoint(
            tmp_path / "out", list(kept(base).values()), source_files(base), key={}, seal=stop, sealed=lambda p: False
        )
    (partial / "config.json").unlink()
    (partial / "config.json.writing").symlink_to(victim)
    options: Any = {"key": {}, "seal": lambda p, r: None, "sealed": lambda p: False, "resume": True}
    with pytest.raises(SteerError, match="symbolic link"):
        write_checkpoint(tmp_path / "out", list(kept(base).values()), source_files(base), **options)
    (partial / "config.json.writing").unlink()
    (partial / "deep").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "custom.py").unlink()
    (partial / "deep").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SteerError, match="symbolic link"):
        write_checkpoint(tmp_path / "out", list(kept(base).values()), source_files(base), **options)
    assert victim.read_text() == "precious" and not list((tmp_path / "elsewhere").iterdir())
    partial.rename(tmp_path / "away")
    partial.symlink_to(tmp_path / "away")
    with pytest.raises(SteerError, match="symbolic link"):
        write_checkpoint(tmp_path / "out", list(kept(base).values()), source_files(base), **options)


def test_what_cannot_be_a_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = kept(base)
    entry = Entry("x", "F32", (2,), 8, 16)
    wrong = {
        "twice": [*tensors.values(), tensors["a.x"]],
        "plain name": [OutTensor("q", "F32", (2,), "../x.safetensors", kept=(base, entry))],
        "kept and made": [OutTensor("q", "F32", (2,), "x.safetensors")],
        "is kept from": [OutTensor("q", "F16", (2,), "x.safetensors", kept=(base, entry))],
    }
    options: Any = {"key": {}, "seal": lambda p, r: None, "sealed": lambda p: False}
    for word, found in wrong.items():
        with pytest.raises(SteerError, match=word):
            write_checkpoint(tmp_path / "out", found, source_files(base), **options)
    short = OutTensor(
        "a.y", "F32", (5,), "model-00001-of-00002.safetensors", make=lambda: iter([np.zeros(3, np.uint8)])
    )
    with pytest.raises(SteerError, match="3 bytes"):
        write(tmp_path / "out", tensors | {"a.y": short}, base)
    with pytest.raises(SteerError, match="in place"):
        write(base / "out", tensors, base)
    assert not (tmp_path / "out").exists()
