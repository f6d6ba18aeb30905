"""Reading YAML that a person may have edited: nothing runs, no key is lost, no type is guessed."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from steer.errors import SteerError
from steer.identity import known_keys

LARGEST = 1 << 20
short = reprlib.repr


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses aliases and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for position, key in enumerate(keys) if key in keys[:position]]
        if twice:
            raise yaml.YAMLError(f"the key {short(twice[0])} is there twice")
        return super().construct_mapping(node, deep)


def load(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file.

    Raises:
        SteerError: no such file, one larger than a megabyte, not YAML, a tag that would run code, a key given twice,
            or something else than a mapping.
    """
    if not path.is_file():
        raise SteerError(f"there is no file {path}", "a .yaml file", "Check the path")
    if path.stat().st_size > LARGEST:
        raise SteerError(
            f"{path} has {path.stat().st_size} bytes",
            f"a text of at most {LARGEST}",
            "Check that it is the .yaml and not the vectors",
        )
    try:
        document = yaml.load(path.read_bytes(), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SteerError(
            f"{path} is not YAML that can be read safely ({reason})",
            "plain mappings, lists, numbers and text",
            "Correct that line",
        ) from error
    if not isinstance(document, dict):
        raise SteerError(f"{path} holds {short(document)}", "a mapping", "Check that it is the right file")
    return document


def require(document: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a mapping that does not hold exactly `keys`.

    Raises:
        SteerError: a key is unknown or missing.
    """
    known_keys(document, keys, where)
    missing = [key for key in keys if key not in document]
    if missing:
        raise SteerError(f"{where} lacks {', '.join(missing)}", f"the keys {', '.join(keys)}", "Add it")


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _layers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _pairs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and _layers(item) for item in value
    )


def _biases(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 3 and _layers(item[:2]) and _number(item[2]) for item in value
    )


_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "site": (lambda value: isinstance(value, str), "text"),
    "phase": (lambda value: isinstance(value, str), "text"),
    "coefficient": (_number, "a number"),
    "weight": (_number, "a number"),
    "value": (_number, "a number"),
    "layers": (_layers, "a list of layer numbers"),
    "heads": (_pairs, "a list of [layer, head] pairs"),
    "experts": (_pairs, "a list of [layer, expert] pairs"),
    "force_in": (_pairs, "a list of [layer, expert] pairs"),
    "force_out": (_pairs, "a list of [layer, expert] pairs"),
    "bias": (_biases, "a list of [layer, expert, number]"),
    "beta": (_number, "a number"),
    "renormalise": (lambda value: type(value) is bool, "true or false"),
}


def typed(value: Any, name: str, where: str) -> Any:
    """Return the value of an intervention's key, lists as tuples.

    Raises:
        SteerError: it is not of the type that the key has.
    """
    test, word = _TYPES[name]
    if not test(value):
        raise SteerError(
            f"{name} of {where} is {short(value)}",
            word,
            "Correct it; numbers carry no quotes, and 1e-3 is written 1.0e-3",
        )
    return (
        tuple(tuple(item) if isinstance(item, list) else item for item in value) if isinstance(value, list) else value
    )
