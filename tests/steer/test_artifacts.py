from __future__ import annotations

import json
import pickle
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from steer.artifacts import FILLED, GIVEN, KINDS, kind_of, provenance, read, tensors_id, write
from tests.steer.made import identity, refused

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    story = provenance(
        model=identity(),
        site="resid_mid",
        convention="raw",
        data_hash="f" * 64,
        data_count=7,
        options={"below": 100},
        seed=3,
        parents=["e" * 64],
        content={"layers": [0]},
    )
    write(path, "direction", {"vectors": torch.arange(6.0).reshape(2, 3)}, story)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write the same tensors with a changed provenance block, as a foreign program might."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        block = json.loads(file.metadata()["steer"])
    changed = change(block)
    save_file(load_file(path), path, {"steer": json.dumps(block if changed is None else changed)})
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_come_back_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 1.0, -2.5], [3.0, 0.1, 7.0]]).to(dtype)
    write(tmp_path / "a.safetensors", "sae", {"x": tensor, "empty": tensor[:0], "scalar": tensor[0, 0]}, {})
    found = read(tmp_path / "a.safetensors", "sae").tensors
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"], tensor)
    assert found["empty"].shape == (0, 3)
    assert found["scalar"].shape == ()


def test_views_of_other_tensors_can_be_written(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "a.safetensors", "sae", {"a": base.T, "b": base[1:], "c": base.requires_grad_()}, {})
    assert torch.equal(read(tmp_path / "a.safetensors").tensors["a"], base.T)


def test_the_block_holds_all_that_design_lists(saved: Path) -> None:
    block = read(saved).provenance
    assert set(block) == {*GIVEN, *FILLED}
    assert block["format_version"] == 1
    assert block["kind"] == "direction"
    assert block["dtype"] == "float32"
    assert (block["site"], block["convention"], block["seed"], block["options"]) == (
        "resid_mid",
        "raw",
        3,
        {"below": 100},
    )
    assert (block["data_hash"], block["data_count"], block["parents"], block["content"]) == (
        "f" * 64,
        7,
        ["e" * 64],
        {"layers": [0]},
    )
    assert isinstance(block["code_version"], str)
    assert read(saved).model == identity()


def test_the_file_is_plain_safetensors_with_mode_0644(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o644
    assert set(load_file(saved)) == {"vectors"}


def test_equal_values_are_equal_bytes(saved: Path, tmp_path: Path) -> None:
    first = read(saved)
    write(
        tmp_path / "b.safetensors", "direction", first.tensors, {key: first.provenance[key] for key in reversed(GIVEN)}
    )
    assert (tmp_path / "b.safetensors").read_bytes() == saved.read_bytes()


def test_an_existing_file_is_kept(saved: Path) -> None:
    before = saved.read_bytes()
    refused(lambda: write(saved, "direction", {"vectors": torch.zeros(1)}, {}), "exists already", "overwrite")
    assert saved.read_bytes() == before
    write(saved, "direction", {"vectors": torch.zeros(1)}, {}, overwrite=True)
    assert read(saved).tensors["vectors"].tolist() == [0.0]


def test_unknown_keys_kinds_and_suffixes_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    refused(lambda: write(path, "direction", {}, {"sead": 1}), "'sead'")
    refused(lambda: write(path, "direction", {}, {"format_version": 2}), "'format_version'")
    refused(lambda: write(path, "vector", {}, {}), "'vector'", *KINDS)
    refused(lambda: write(tmp_path / "a.pt", "direction", {}, {}), ".safetensors")
    assert not list(tmp_path.iterdir())


def test_another_kind_is_refused(saved: Path) -> None:
    refused(lambda: read(saved, "patch"), "kind 'direction'", "expected kind 'patch'")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(lambda: read(tmp_path / "no.safetensors"), "there is no file", "no.safetensors")


class Trap:
    """Unpickling this is the test's failure."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_unopened(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Trap(), protocol))
    refused(lambda: read(path), "pickle", "run code")


def test_a_torch_file_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"a": Trap()}, path)
    refused(lambda: read(path), "pickle")


JUNK = [
    b"",
    b"junk",
    b"\x00" * 100,
    b"{}",
    b"not a tensor file at all, only words",
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 1 << 60),
]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_refused(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(junk)
    refused(lambda: read(path), "a.safetensors", "written by this toolkit")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 0.999))
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    write(path, "sae", {"x": torch.arange(10.0)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(lambda: read(path), "a.safetensors")


def test_a_changed_bit_is_found(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-2] ^= 1
    saved.write_bytes(data)
    refused(lambda: read(saved), "damaged", "hash")


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    refused(lambda: read(path), "without our provenance")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda block: block.update(format_version=2), "version 2"),
        (lambda block: block.update(format_version="1"), "version '1'"),
        (lambda block: block.update(sead=1), "'sead'"),
        (lambda block: block.pop("seed") and None, "lacks seed"),
        (lambda block: block.update(kind="spell"), "'spell'"),
        (lambda block: block.update(kind=["direction"]), "unknown kind"),
        (lambda block: [block], "JSON object"),
        (lambda block: 5, "JSON object"),
    ],
)
def test_a_block_from_elsewhere_is_refused(saved: Path, change: Callable[[dict[str, Any]], object], word: str) -> None:
    refused(lambda: read(rewritten(saved, change)), word)


def test_a_block_that_is_no_json_is_refused(saved: Path) -> None:
    save_file(load_file(saved), saved, {"steer": "{"})
    refused(lambda: read(saved), "not JSON")


@given(st.permutations(["a", "b", "c"]))
def test_tensors_id_does_not_depend_on_order(names: list[str]) -> None:
    values = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(1, 2)}
    assert tensors_id({name: values[name] for name in names}) == tensors_id(values)


def test_tensors_id_sees_names_shapes_dtypes_and_values() -> None:
    base = torch.zeros(2, 3)
    others = [{"b": base}, {"a": base.reshape(3, 2)}, {"a": base.to(torch.int32)}, {"a": base + 1}, {"a": -base}, {}]
    assert len({tensors_id(other) for other in [{"a": base}, *others]}) == len(others) + 1


def test_tensors_id_does_not_see_how_a_tensor_lies_in_memory() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert tensors_id({"a": base.T}) == tensors_id({"a": base.T.contiguous()})


def test_kinds_of_files(saved: Path, tmp_path: Path) -> None:
    assert kind_of(saved) == "direction"
    (tmp_path / "s.yaml").write_text("kind: steering")
    assert kind_of(tmp_path / "s.yaml") == "steering"
    (tmp_path / "lora").mkdir()
    refused(lambda: kind_of(tmp_path / "lora"), "adapter_config.json", "MODEL")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert kind_of(tmp_path / "lora") == "adapter"
    refused(lambda: kind_of(tmp_path / "none.yaml"), "no file")
    refused(lambda: kind_of(tmp_path / "none"), "no file")


class Asked(dict[str, torch.Tensor]):
    """Tensors that know how often they were asked for, and can fail then."""

    def __init__(self, tensors: dict[str, torch.Tensor], fail_at: int = -1) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []
        self.fail_at = fail_at

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        if len(self.asked) == self.fail_at:
            raise OSError(28, "No space left on device")
        return super().__getitem__(name)


@pytest.mark.faults
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, moment: int) -> None:
    tensors = Asked({"x": torch.zeros(2), "y": torch.zeros(3)}, moment)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.safetensors", "sae", tensors, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchecked_types")
def test_each_tensor_is_asked_for_twice_and_never_all_at_once(tmp_path: Path) -> None:
    tensors = Asked({"b": torch.ones(4), "a": torch.zeros(2, dtype=torch.float64)})
    write(tmp_path / "a.safetensors", "sae", tensors, {})
    assert tensors.asked == ["a", "b", "a", "b"]


def test_the_file_is_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    """Several dtypes and an odd number of bytes, so that order and alignment matter."""
    tensors = {
        "half": torch.arange(3).bfloat16(), "n": torch.arange(5), "wide": torch.randn(2, 3, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]), "ä": torch.randn(4, 1), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    write(tmp_path / "a.safetensors", "sae", tensors, {})
    block = safe_open(tmp_path / "a.safetensors", "pt").metadata()
    theirs = load(save(tensors, block))
    ours = load((tmp_path / "a.safetensors").read_bytes())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    one = {name: tensors[name] for name in ("ä",)}
    write(tmp_path / "b.safetensors", "sae", one, {})
    assert (tmp_path / "b.safetensors").read_bytes() == save(
        one, safe_open(tmp_path / "b.safetensors", "pt").metadata()
    )


def test_a_mapped_file_is_read_as_it_is_used(tmp_path: Path) -> None:
    """A large tensor stays in the file; the numbers are the same."""
    kept = torch.arange(1 << 22, dtype=torch.float32)
    write(tmp_path / "a.safetensors", "sae", {"x": kept}, {})
    read(tmp_path / "a.safetensors", mapped=True)
    before = anonymous()
    mapped = read(tmp_path / "a.safetensors", mapped=True).tensors["x"]
    assert anonymous() - before < kept.nbytes / 4
    copied = read(tmp_path / "a.safetensors").tensors["x"]
    assert torch.equal(mapped, kept) and torch.equal(copied, kept)
    assert anonymous() - before > kept.nbytes / 2, "the measure cannot see a copy"


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.faults
def test_a_place_that_cannot_be_written_is_the_systems_error() -> None:
    with pytest.raises(OSError, match=r"No such file|not permitted|denied"):
        write("/proc/a.safetensors", "sae", {"x": torch.zeros(2)}, {})
