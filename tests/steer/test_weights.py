"""Weights ids: content decides, known hashes are used, big files are not read unasked."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from steer import weights
from steer.identity import UNKNOWN
from steer.weights import cache_file, weights_id


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder, tuple(f"{name}.safetensors" for name in files)


def test_the_content_of_all_files_decides(tmp_path):
    one, copy = (weights_id(*model(tmp_path / name, a=b"12", b=b"3")) for name in ("one", "copy"))
    assert one == copy != UNKNOWN
    assert weights_id(*model(tmp_path / "cut", a=b"1", b=b"23")) != one
    assert weights_id(*model(tmp_path / "other", a=b"12", b=b"4")) != one
    folder, files = model(tmp_path / "one", a=b"12", b=b"3")
    assert weights_id(folder, files[::-1]) == one


def test_big_files_are_read_only_when_asked_and_then_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 1)
    folder, files = model(tmp_path / "big", a=b"12")
    assert weights_id(folder, files) == UNKNOWN
    asked = weights_id(folder, files, compute=True)
    assert asked != UNKNOWN and weights_id(folder, files) == asked
    remembered = json.loads(cache_file().read_text())
    assert remembered[str((folder / files[0]).resolve())][-1] == hashlib.sha256(b"12").hexdigest()
    (folder / files[0]).write_bytes(b"34")
    os.utime(folder / files[0], ns=(1, 1))
    assert weights_id(folder, files) == UNKNOWN  # Another time: what was remembered no longer counts.


def test_blobs_of_the_hub_cache_are_known_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    digest = hashlib.sha256(b"12").hexdigest()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / digest).write_bytes(b"12")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").symlink_to(blobs / digest)
    known = weights_id(snapshot, ("a.safetensors",))
    assert known == weights_id(*model(tmp_path / "plain", a=b"12"), compute=True)
    (blobs / "0123").write_bytes(b"12")  # Not a hash: a git blob of a small file.
    (snapshot / "b.safetensors").symlink_to(blobs / "0123")
    assert weights_id(snapshot, ("b.safetensors",)) == UNKNOWN


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 3}'])
def test_a_damaged_cache_is_an_empty_one(tmp_path, content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert weights_id(*model(tmp_path / "one", a=b"12")) != UNKNOWN


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = weights_id(*model(tmp_path / "one", a=b"12"))
    assert first == weights_id(tmp_path / "one", ("a.safetensors",)) != UNKNOWN
