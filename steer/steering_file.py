"""The file form of a steering: `name.yaml` for the reader, `name.safetensors` for the vectors.

The first may be edited by hand (another coefficient, fewer layers); it holds the hash of the second, so the two cannot
be mixed up. Where no intervention has a direction there is no second file, and the hash is null. See docs/values.md for
an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from steer import artifacts, yaml_text
from steer.directions import Direction, describe, from_stored
from steer.errors import SteerError
from steer.files import refuse_existing, write_text
from steer.identity import ModelIdentity, known_keys
from steer.interventions import Intervention
from steer.steering import KINDS, Directed, Steering, as_json

FORMAT_VERSION = 1
_KEYS = ("format_version", "kind", "name", "model", "vectors", "interventions")


def save(steering: Steering, path: Path, overwrite: bool = False) -> Path:
    """Write both files, or the first where there are no directions, and return its path.

    The vectors are written first: a run that is cut between the two leaves an old .yaml, whose hash then refuses the
    new vectors.

    Raises:
        SteerError: another suffix, a file that exists, or a `Custom` intervention.
        OSError: the disk or the permissions refuse.
    """
    path = _yaml_path(path)
    vectors = path.with_suffix(".safetensors")
    directions = list(steering.directions)
    rows = [
        as_json(each) | ({"direction": directions.index(each.direction)} if isinstance(each, Directed) else {})
        for each in steering.savable("cannot be saved")
    ]
    for target in (path, *([vectors] if directions else [])):
        refuse_existing(target, overwrite)
    tensors = {str(index): direction.vectors for index, direction in enumerate(directions)}
    if tensors:
        content = {"directions": [{**direction.provenance, **describe(direction)} for direction in directions]}
        story = artifacts.provenance(model=steering.model, content=content)
        artifacts.write(vectors, "steering", tensors, story, overwrite)
    document = {
        "format_version": FORMAT_VERSION,
        "kind": "steering",
        "name": steering.name,
        "model": None if steering.model is None else steering.model.to_dict(),
        "vectors": artifacts.tensors_id(tensors) if tensors else None,
        "interventions": rows,
    }
    write_text(
        path,
        yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120),
        overwrite,
    )
    return path


def load(path: Path) -> Steering:
    """Read what `save` wrote, or a reader edited.

    Raises:
        SteerError: a file is missing, damaged or of another kind or version, holds unknown keys or values out of range,
            or the two files do not belong together.
    """
    path = _yaml_path(path)
    document = yaml_text.load(path)
    where = f"the steering file {path}"
    if (document.get("kind"), document.get("format_version")) != ("steering", FORMAT_VERSION):
        raise SteerError(
            f"{where} is of kind {yaml_text.short(document.get('kind'))}, version {yaml_text.short(document.get('format_version'))}",
            f"kind 'steering', version {FORMAT_VERSION}",
            "Read it with the version of reasoning-steer that wrote it, or make it again",
        )
    yaml_text.require(document, _KEYS, where)
    rows = document["interventions"]
    if not isinstance(rows, list) or not isinstance(document["name"], str):
        raise SteerError(
            f"{where} holds no list of interventions, or no name",
            "a text `name` and a list `interventions`",
            "Save the steering again",
        )
    stored = document["vectors"]
    directions = [] if stored is None else _stored_directions(path.with_suffix(".safetensors"), stored)
    model = None if document["model"] is None else ModelIdentity.from_dict(document["model"])
    interventions = tuple(
        _intervention(row, directions, f"intervention {number} of {where}") for number, row in enumerate(rows)
    )
    return Steering(interventions, model, document["name"])


def _intervention(row: object, directions: list[Direction], where: str) -> Intervention:
    kind = row.get("kind") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or not isinstance(kind, str) or kind not in KINDS:
        raise SteerError(
            f"{where} is of the unknown kind {yaml_text.short(kind)}",
            f"one of {', '.join(KINDS)}",
            "Correct the spelling",
        )
    made = KINDS[kind]
    allowed = {field.name: field for field in fields(made)}
    known_keys(row, ("kind", *allowed), where)
    missing = [name for name, field in allowed.items() if field.default is MISSING and name not in row]
    if missing:
        raise SteerError(f"{where} lacks {', '.join(missing)}", "every key without a default", "Add it")
    values: dict[str, Any] = {
        name: yaml_text.typed(row[name], name, where) for name in row if name not in ("kind", "direction")
    }
    if "direction" in allowed:
        values["direction"] = _direction(row["direction"], directions, where)
    return made(**values)


def _direction(number: object, directions: list[Direction], where: str) -> Direction:
    if type(number) is not int or not 0 <= number < len(directions):
        expected = f"a number from 0 to {len(directions) - 1}" if directions else "vectors, and this file has none"
        raise SteerError(f"{where} names direction {yaml_text.short(number)}", expected, "Save the steering again")
    return directions[number]


def _stored_directions(path: Path, expected: object) -> list[Direction]:
    stored = artifacts.read(path, "steering")
    if stored.provenance["tensors_id"] != expected:
        raise SteerError(
            f"{path} holds other vectors than its .yaml was saved with",
            "the pair of files that was saved",
            "Copy both files together, or save the steering again",
        )
    content = stored.provenance["content"]
    blocks = content.get("directions") if isinstance(content, Mapping) else None
    if not isinstance(blocks, list) or set(stored.tensors) != {str(index) for index in range(len(blocks))}:
        raise SteerError(
            f"{path} does not list its directions", "one block of provenance per tensor", "Save the steering again"
        )
    return [from_stored(stored.tensors[str(index)], block, str(path)) for index, block in enumerate(blocks)]


def _yaml_path(path: Path) -> Path:
    if path.suffix not in (".yaml", ".yml"):
        raise SteerError(
            f"the name {path.name!r} does not end in .yaml",
            "the .yaml of a steering",
            f"Give {path.with_suffix('.yaml').name!r}; its vectors lie beside it in the .safetensors of the same name",
        )
    return path
