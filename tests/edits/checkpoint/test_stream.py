"""Copying with a few ranges rewritten: every path through the kernel's refusals gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edits.checkpoint import stream
from edits.checkpoint.stream import copy_range, read_exactly, safetensors_header, write_all
from edits.checkpoint.write import Copied, OutTensor, write_parts, write_together
from steer.errors import SteerError

SIZE = 100_003


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int, bytes]]:
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
    (tmp_path / "source").write_bytes(data)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target, data
    os.close(source)
    os.close(target)


def written(target: int) -> bytes:
    return os.pread(target, 2 * SIZE, 0)


def refuse(number: int) -> Any:
    def copy(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize(
    "refusal", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, "absent", "zero", "short"]
)
def test_copies_whatever_the_kernel_says(
    pair: tuple[int, int, bytes], refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, data = pair
    monkeypatch.setattr(stream, "STEP", 4096)
    real = os.copy_file_range
    if refusal == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif refusal == "zero":
        monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    elif refusal == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, x, y: real(a, b, min(count, 7), x, y))
    elif refusal is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse(refusal))
    copy_range(source, target, 10, SIZE)
    assert written(target)[10:] == data[10:]


def test_a_full_disk_is_not_taken_for_a_missing_call(
    pair: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        copy_range(pair[0], pair[1], 0, SIZE)


def test_short_writes_and_reads_are_looped(pair: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, data = pair
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[: max(1, len(view) // 3)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    buffer = read_exactly(source, 5, 7000)
    write_all(target, buffer, 5)
    write_all(target, b"abc", 0)
    assert written(target) == b"abc\0\0" + data[5:7000]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_ends_early_is_an_error(
    pair: tuple[int, int, bytes], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, _ = pair
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    with pytest.raises(SteerError, match="ends at byte"):
        copy_range(source, target, 0, SIZE + 1)
    with pytest.raises(SteerError, match="ends at byte"):
        read_exactly(source, SIZE - 3, SIZE + 1)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, SIZE), max_size=8, unique=True), pieces=st.integers(1, 3), makers=st.integers(1, 3))
def test_made_ranges_are_written_between_copied_ones_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], pieces: int, makers: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    data = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    (folder / "source").write_bytes(data.tobytes())
    bounds, expected, parts = [0, *sorted(cuts), SIZE], data.copy(), []
    for number, (start, end) in enumerate(pairwise(bounds)):
        if number % 2:
            expected[start:end] ^= 0xFF
            flipped = np.array_split(expected[start:end], pieces)
            made = OutTensor(
                f"t{number}",
                "U8",
                (end - start,),
                "target",
                make=partial(iter, flipped),
                record=partial(dict, n=number),
            )
            parts.append(made)
        else:
            parts.append(Copied(folder / "source", start, end))
    counted: list[int] = []
    target = os.open(folder / "target", os.O_RDWR | os.O_CREAT)
    try:
        if makers > 1:
            records = write_together(target, parts, counted.append, makers)
        else:
            records = write_parts(target, parts, counted.append, hashed=pieces == 2)
    finally:
        os.close(target)
    assert (folder / "target").read_bytes() == expected.tobytes()
    made = [number for number in range(len(bounds) - 1) if number % 2]
    assert [record["n"] for record in records.get("tensors", {}).values()] == made
    assert sum(counted) == SIZE
    assert makers > 1 or pieces != 2 or records["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()


@pytest.mark.parametrize("source_ends", [False, True])
def test_what_goes_wrong_while_a_tensor_is_made_ahead_is_raised(tmp_path: Path, source_ends: bool) -> None:
    (tmp_path / "source").write_bytes(bytes(100))

    def broken() -> Iterator[stream.Bytes]:
        raise SteerError("the tensor cannot be made", "one that can")
        yield np.zeros(0, dtype=np.uint8)

    parts = [
        Copied(tmp_path / "source", 0, 200 if source_ends else 100),
        OutTensor("t", "U8", (4,), "target", make=broken),
    ]
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(SteerError, match="ends at byte 100" if source_ends else "cannot be made"):
            write_parts(target, parts, lambda count: None)
    finally:
        os.close(target)


def test_what_one_maker_meets_stops_the_others(tmp_path: Path) -> None:
    asked: list[int] = []

    def broken() -> Iterator[stream.Bytes]:
        yield np.zeros(1, dtype=np.uint8)
        raise SteerError("the tensor cannot be made", "one that can")

    def endless() -> Iterator[stream.Bytes]:
        for number in range(10**6):
            asked.append(number)
            yield np.zeros(1, dtype=np.uint8)

    makes = {"endless": (10**6, endless), "broken": (4, broken), "late": (2, endless)}
    parts = [OutTensor(name, "U8", (size,), "target", make=make) for name, (size, make) in makes.items()]
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(SteerError, match="cannot be made"):
            write_together(target, parts, lambda count: None, 2)
    finally:
        os.close(target)
    assert len(asked) < 10**6

    wrong = [OutTensor("short", "U8", (4,), "target", make=partial(iter, [np.zeros(3, dtype=np.uint8)]))]
    target = os.open(tmp_path / "target", os.O_RDWR)
    try:
        with pytest.raises(SteerError, match="was made with 3 bytes"):
            write_together(target, wrong, lambda count: None, 2)
    finally:
        os.close(target)


def test_a_header_written_by_hand_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int16).view(2, 3), "a": torch.randn(5).bfloat16()}
    words = {"b": "I16", "a": "BF16"}
    raw = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    header = safetensors_header({name: (words[name], tuple(tensors[name].shape), len(raw[name])) for name in tensors})
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + b"".join(raw[name] for name in tensors))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
