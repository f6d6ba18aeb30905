from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.backends.vllm.server.directory import Directory, Entry
from tests.steer.backends.vllm.server.serving import adapter, adding
from tests.steer.made import refused

MOST = 1 << 20


def age(path: Path, seconds: float = 100.0) -> None:
    """As if the file had been there for long."""
    state = path.stat()
    os.utime(path, (state.st_atime - seconds, state.st_mtime - seconds))


def found(directory: Directory, name: str, most: int = MOST) -> Entry:
    entry = directory.find(name, most)
    assert entry is not None
    return entry


def test_a_name_is_that_of_the_file_and_means_what_lies_there_now(tmp_path: Path) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    directory = Directory(tmp_path)
    assert directory.names() == ("calm",)
    assert found(directory, "calm").fingerprint == adding(0).fingerprint
    adding(1).save(tmp_path / "calm.yaml", overwrite=True)
    assert found(directory, "calm").fingerprint == adding(1).fingerprint
    adding(2).save(tmp_path / "late.yaml")
    assert [entry.name for entry in directory.entries(MOST)] == ["calm", "late"]
    (tmp_path / "calm.yaml").unlink()
    assert directory.find("calm", MOST) is None


def test_one_look_at_an_unchanged_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    monkeypatch.setattr("steer.backends.vllm.server.directory.UNSETTLED", -1.0)
    directory = Directory(tmp_path)
    assert found(directory, "calm") is found(directory, "calm")
    age(tmp_path / "calm.yaml")
    again = found(directory, "calm")
    assert again is found(directory, "calm")


def test_a_file_that_was_just_written_is_read_again_even_if_it_looks_the_same(tmp_path: Path) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    directory = Directory(tmp_path)
    assert found(directory, "calm") is not found(directory, "calm")


def test_a_file_that_no_longer_parses_is_refused_with_the_reason_and_served_again_when_it_does(tmp_path: Path) -> None:
    path = adding(0).save(tmp_path / "calm.yaml")
    directory = Directory(tmp_path)
    good = path.read_text()
    path.write_text(good.replace("resid_post", "resid_pots"))
    entry = found(directory, "calm")
    assert "resid_pots" in entry.problem and entry.steering is None and not entry.fingerprint
    assert str(tmp_path) not in entry.problem, "where the folder lies is nobody's business"
    path.write_text("{")
    assert "not YAML" in found(directory, "calm").problem
    path.write_text(good)
    assert not found(directory, "calm").problem


def test_vectors_that_were_exchanged_without_the_yaml_are_refused(tmp_path: Path) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    adding(1).save(tmp_path / "other.yaml")
    (tmp_path / "other.safetensors").replace(tmp_path / "calm.safetensors")
    assert found(Directory(tmp_path), "calm").problem


def test_nothing_outside_the_folder_has_a_name(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    adding(0).save(tmp_path / "secret.yaml")
    adding(0).save(inside / "real.yaml")
    for suffix in (".yaml", ".safetensors"):
        (inside / f"out{suffix}").symlink_to(tmp_path / f"secret{suffix}")
        (inside / f"same{suffix}").symlink_to(inside / f"real{suffix}")
    directory = Directory(inside)
    for name in (
        "../secret",
        "..",
        ".",
        "",
        "/etc/passwd",
        str(tmp_path / "secret"),
        "in/../real",
        "real.yaml",
        "none",
    ):
        assert directory.find(name, MOST) is None, name
    assert "outside" in found(directory, "out").problem and found(directory, "out").steering is None
    assert not found(directory, "same").problem
    (inside / "half.yaml").write_bytes((inside / "real.yaml").read_bytes())
    (inside / "half.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert "half.safetensors" in found(directory, "half").problem
    (inside / "dangling.yaml").symlink_to(tmp_path / "nothing.yaml")
    assert directory.find("dangling", MOST) is None


def test_a_link_in_a_circle_is_a_problem_of_one_name_alone(tmp_path: Path) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    (tmp_path / "circle.yaml").write_bytes((tmp_path / "calm.yaml").read_bytes())
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    (tmp_path / "bare.yaml").symlink_to("bare.yaml")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").symlink_to("adapter_config.json")
    assert {entry.name: bool(entry.problem) for entry in Directory(tmp_path).entries(MOST)} == {
        "calm": False,
        "circle": True,
    }


def test_a_folder_that_is_gone_is_no_folder_without_steerings(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    directory = Directory(tmp_path / "in")
    (tmp_path / "in").rmdir()
    for look in (directory.names, lambda: directory.find("calm", MOST), lambda: directory.entries(MOST)):
        with pytest.raises(FileNotFoundError):
            look()


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_is_not(name: str) -> None:
    entry = _FOLDER.find(name, MOST)
    assert (entry is not None) == (name == "here")


def _only_here() -> Directory:
    import atexit
    import tempfile

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    adding(0).save(Path(folder.name) / "here.yaml")
    return Directory(Path(folder.name))


_FOLDER = _only_here()


def test_size_limits_count_the_vectors(tmp_path: Path) -> None:
    adding(0).save(tmp_path / "calm.yaml")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    directory = Directory(tmp_path)
    assert not found(directory, "calm", size).problem
    assert str(size) in found(directory, "calm", size - 1).problem
    assert not found(directory, "calm", size).problem


def test_what_the_engine_cannot_run_is_listed_with_the_reason(tmp_path: Path) -> None:
    adding(0, (1,)).save(tmp_path / "near.yaml")
    adding(0, (2,)).save(tmp_path / "far.yaml")
    directory = Directory(
        tmp_path, lambda steering: "Too far." if steering.interventions[0].active_layers[0] > 1 else ""
    )
    rows = {entry.name: entry.describe() for entry in directory.entries(MOST)}
    assert rows["near"]["servable"] and rows["near"]["problem"] is None
    assert not rows["far"]["servable"] and rows["far"]["problem"] == "Too far."
    assert rows["far"]["layers"] == [2] and rows["far"]["sites"] == ["resid_post"] and rows["far"]["phases"] == ["all"]
    assert rows["far"]["fingerprint"] == adding(0, (2,)).fingerprint
    assert str(rows["near"]["modified"]).endswith("Z")


def test_adapters_are_those_that_the_engine_was_started_with(tmp_path: Path) -> None:
    adapter(tmp_path / "tuned")
    first = found(Directory(tmp_path), "tuned")
    assert first.adapter and not first.problem and first.describe()["kind"] == "adapter"
    directory = Directory(tmp_path, adapters={"tuned": first.fingerprint})
    assert not found(directory, "tuned").problem
    (tmp_path / "tuned" / "adapter_model.safetensors").write_bytes(b"changed")
    assert "has changed" in found(directory, "tuned").problem
    adapter(tmp_path / "late")
    assert "was put there" in found(directory, "late").problem
    adding(0).save(tmp_path / "tuned.yaml")
    assert "same name" in found(directory, "tuned").problem


def test_a_folder_that_is_not_there_is_refused_and_none_offers_nothing(tmp_path: Path) -> None:
    refused(lambda: Directory(tmp_path / "none"), "no folder")
    assert Directory(None).names() == () and Directory(None).find("calm", MOST) is None
