from __future__ import annotations

from pathlib import Path

import pytest

from steer.yaml_text import LARGEST, load, require, typed
from tests.steer.made import refused

BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['TARGET']",
        "!!python/object/new:os.mkdir ['TARGET']",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!custom x",
    ],
)
def test_no_tag_runs_code(tmp_path: Path, tag: str) -> None:
    target = tmp_path / "made"
    refused(lambda: load(written(tmp_path, "kind: " + tag.replace("TARGET", str(target)))), "safely", "s.yaml")
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1\na: 2\n", "'a' is there twice"),
        ("x:\n- {b: 1, b: 2}\n", "'b' is there twice"),
        (BOMB, "alias"),
        ("a: [1, 2", "not YAML"),
        ("a: \x00", "not YAML"),
        ("\x89PNG", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("steering", "expected a mapping"),
        ("? [1, 2]\n: 3\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, word: str) -> None:
    refused(lambda: load(written(tmp_path, text)), word)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    refused(lambda: load(path), "not YAML")


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    refused(lambda: load(written(tmp_path, "#" * (LARGEST + 1))), str(LARGEST + 1))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "no.yaml"), "no file")


def test_a_plain_mapping_is_read(tmp_path: Path) -> None:
    assert load(written(tmp_path, "a: [1, 2.5, grün, null]\nb: {c: true}\n")) == {
        "a": [1, 2.5, "grün", None],
        "b": {"c": True},
    }


def test_keys_are_exactly_those(tmp_path: Path) -> None:
    require({"a": 1, "b": 2}, ("b", "a"), "it")
    refused(lambda: require({"a": 1}, ("a", "b"), "it"), "it lacks b")
    refused(lambda: require({"a": 1, "c": 2}, ("a",), "it"), "'c'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", 3), ("phase", True), ("coefficient", "0.5"), ("coefficient", True), ("weight", None), ("value", [1.0]), ("layers", 3), ("layers", ["1"]),
        ("layers", [True]), ("layers", [1.5]), ("heads", [1, 2]), ("heads", [[1]]), ("heads", [[1, 2, 3]]), ("heads", [[1, "2"]]),
    ],
)  # fmt: skip
def test_no_type_is_guessed(name: str, value: object) -> None:
    refused(lambda: typed(value, name, "intervention 0"), name, "intervention 0")


def test_lists_become_tuples() -> None:
    assert typed([[1, 2], [3, 4]], "heads", "it") == ((1, 2), (3, 4))
    assert typed([3, 1], "layers", "it") == (3, 1)
    assert typed(1, "weight", "it") == 1
