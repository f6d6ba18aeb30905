from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from steer.errors import SteerError
from steer.files import refuse_existing, replacing, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_file_is_readable_by_all_whatever_the_mask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "grün\n")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.txt") == 0o644
    assert (tmp_path / "a.txt").read_bytes() == "grün\n".encode()


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "deep", "a.txt"]


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(SteerError, match="exists already"):
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new", overwrite=True)
    assert path.read_text() == "new"


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(SteerError, match="is a folder"):
            refuse_existing(tmp_path, overwrite)


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, overwrite=True) as partial:
        partial.write_text("half")
        raise RuntimeError("cut")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_end_the_old_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path, overwrite=True) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
    assert path.read_text() == "new"


def test_a_loaded_copy_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as held:
        write_text(path, "new", overwrite=True)
        assert held.read() == "old", "the file was changed in place"


def test_a_block_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "x")
    assert not list(tmp_path.iterdir())
