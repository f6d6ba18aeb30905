"""Steering: an ordered tuple of interventions made for a model, and its file form.

On disk a steering is two files, `name.yaml` for the reader and `name.safetensors` for the vectors. The first may be
edited by hand (another coefficient, fewer layers); it holds the hash of the second, so the two cannot be mixed up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import yaml

from steer import artifacts, yaml_text
from steer.directions import Direction, describe, from_stored
from steer.errors import SteerError
from steer.files import refuse_existing, write_text
from steer.identity import ModelIdentity, canonical, check_same, digest, known_keys, mix
from steer.interventions import Add, Custom, Intervention, ProjectOut, SetComponent, check_coefficient

FORMAT_VERSION = 1
KINDS: dict[str, type[Add] | type[ProjectOut] | type[SetComponent]] = {
    "add": Add,
    "project_out": ProjectOut,
    "set_component": SetComponent,
}
STRENGTH = {Add: "coefficient", ProjectOut: "weight"}
_KEYS = ("format_version", "kind", "name", "model", "vectors", "interventions")


class Numbers(Protocol):
    """What a steering asks of an anatomy."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...


@dataclass(frozen=True)
class Steering:
    """Interventions in order: forward order across sites, tuple order within a site, each seeing what came before.

    Attributes:
        interventions: at least one.
        model: what it was made for; None takes it from the directions. No part of the fingerprint.
        name: for the reader; no part of the fingerprint.

    Raises:
        SteerError: there is no intervention, or the directions come from different models.
    """

    interventions: tuple[Intervention, ...]
    model: ModelIdentity | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        if not self.interventions:
            raise SteerError("the steering has no intervention, so it would do nothing", "at least one")
        model = self.model
        for direction in self.directions:
            model = mix(model, direction.model, "the directions of the steering")
        object.__setattr__(self, "model", model)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Every direction once, in order of first use."""
        found: dict[Direction, None] = {}
        for intervention in self.interventions:
            if not isinstance(intervention, Custom):
                found[intervention.direction] = None
        return tuple(found)

    @property
    def has_fingerprint(self) -> bool:
        """False where a `Custom` function takes part: nobody can say whether two functions are the same."""
        return not any(isinstance(intervention, Custom) for intervention in self.interventions)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the steering does: what, where, when, how strongly, with which vectors.

        Raises:
            SteerError: a `Custom` intervention takes part.
        """
        return self._hash(strength=True)

    @cached_property
    def vectors_id(self) -> str:
        """The fingerprint without coefficients and weights: what has to be loaded once to serve every strength.

        Raises:
            SteerError: a `Custom` intervention takes part.
        """
        return self._hash(strength=False)

    def _hash(self, strength: bool) -> str:
        rows = []
        for intervention in self._savable("has no fingerprint"):
            row = _as_json(intervention) | {
                "direction": intervention.direction.only(intervention.active_layers).fingerprint
            }
            if not strength:
                row.pop(STRENGTH.get(type(intervention), ""), None)
            rows.append(row)
        return digest([canonical(rows).encode()])

    def _savable(self, otherwise: str) -> list[Add | ProjectOut | SetComponent]:
        savable = [intervention for intervention in self.interventions if not isinstance(intervention, Custom)]
        if len(savable) < len(self.interventions):
            raise SteerError(
                f"the steering holds a Custom function, so it {otherwise}",
                "Add, ProjectOut or SetComponent",
                "Use it as a hook within one program only",
            )
        return savable

    def scaled(self, c: float) -> Steering:
        """Return the steering with the request coefficient c multiplied into every coefficient and weight.

        Raises:
            SteerError: c is not finite, or not 1 where a `SetComponent` or `Custom` takes part.
        """
        changed = []
        for intervention in self.interventions:
            check_coefficient(intervention, c)
            if isinstance(intervention, Add):
                intervention = replace(intervention, coefficient=c * intervention.coefficient)
            elif isinstance(intervention, ProjectOut):
                intervention = replace(intervention, weight=c * intervention.weight)
            changed.append(intervention)
        return replace(self, interventions=tuple(changed))

    def check(self, anatomy: Numbers, identity: ModelIdentity | None = None) -> None:
        """Refuse a model that the steering does not fit; warn when only its weights differ.

        Args:
            anatomy: counts layers and heads, and knows hidden size and head width.
            identity: of the model at hand, where known.

        Raises:
            SteerError: another shape, or a layer, a head or a width out of range.
        """
        check_same(self.model, identity, f"the steering {self.name!r}" if self.name else "the steering")
        for intervention in self.interventions:
            _check_range(intervention, anatomy)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write `name.yaml` and `name.safetensors` side by side and return the first path.

        Raises:
            SteerError: another suffix, a file that exists, or a `Custom` intervention.
            OSError: the disk or the permissions refuse.
        """
        path = _yaml_path(path)
        vectors = path.with_suffix(".safetensors")
        for target in (path, vectors):
            refuse_existing(target, overwrite)
        directions = list(self.directions)
        rows = [
            _as_json(each) | {"direction": directions.index(each.direction)}
            for each in self._savable("cannot be saved")
        ]
        tensors = {str(index): direction.vectors for index, direction in enumerate(directions)}
        content = {"directions": [{**direction.provenance, **describe(direction)} for direction in directions]}
        artifacts.write(
            vectors, "steering", tensors, artifacts.provenance(model=self.model, content=content), overwrite
        )
        head = {
            "format_version": FORMAT_VERSION,
            "kind": "steering",
            "name": self.name,
            "model": None if self.model is None else self.model.to_dict(),
        }
        text = yaml.safe_dump(
            head | {"vectors": artifacts.tensors_id(tensors), "interventions": rows},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=120,
        )
        write_text(path, text, overwrite)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote, or a reader edited.

        Raises:
            SteerError: a file is missing, damaged or of another kind or version, holds unknown keys or values out of
                range, or the two files do not belong together.
        """
        path = _yaml_path(path)
        document = yaml_text.load(path)
        where = f"the steering file {path}"
        yaml_text.require(document, _KEYS, where)
        if (document["kind"], document["format_version"]) != ("steering", FORMAT_VERSION):
            raise SteerError(
                f"{where} is of kind {document['kind']!r}, version {document['format_version']!r}",
                f"kind 'steering', version {FORMAT_VERSION}",
                "Read it with the version of reasoning-steer that wrote it, or make it again",
            )
        directions = _stored_directions(path.with_suffix(".safetensors"), document["vectors"])
        rows = document["interventions"]
        if not isinstance(rows, list) or not isinstance(document["name"], str):
            raise SteerError(
                f"{where} holds no list of interventions, or no name",
                "a text `name` and a list `interventions`",
                "Save the steering again",
            )
        model = None if document["model"] is None else ModelIdentity.from_dict(document["model"])
        return cls(
            tuple(_from_json(row, directions, f"intervention {number} of {where}") for number, row in enumerate(rows)),
            model,
            document["name"],
        )


def _as_json(intervention: Add | ProjectOut | SetComponent) -> dict[str, Any]:
    """Return everything but the direction."""
    values = {
        field.name: getattr(intervention, field.name) for field in fields(intervention) if field.name != "direction"
    }
    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    if "heads" in plain:
        plain.pop("layers")
    return {"kind": next(word for word, kind in KINDS.items() if type(intervention) is kind)} | plain


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _from_json(row: object, directions: list[Direction], where: str) -> Intervention:
    kind = row.get("kind") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or kind not in KINDS:
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
    number = row["direction"]
    if type(number) is not int or not 0 <= number < len(directions):
        raise SteerError(
            f"{where} names direction {yaml_text.short(number)}",
            f"a number from 0 to {len(directions) - 1}",
            "Save the steering again",
        )
    values = {name: yaml_text.typed(row[name], name, where) for name in row if name not in ("kind", "direction")}
    return made(directions[number], **values)


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
    if not isinstance(blocks, list) or sorted(stored.tensors, key=int) != [str(index) for index in range(len(blocks))]:
        raise SteerError(
            f"{path} does not list its directions", "one block of provenance per tensor", "Save the steering again"
        )
    return [from_stored(stored.tensors[str(index)], block, str(path)) for index, block in enumerate(blocks)]


def _yaml_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise SteerError(
            f"the name {path.name!r} does not end in .yaml",
            "the .yaml of a steering",
            "Its vectors lie beside it in the .safetensors of the same name",
        )
    return path


def _check_range(intervention: Intervention, anatomy: Numbers) -> None:
    what = f"{type(intervention).__name__} at {intervention.site}"
    if intervention.active_layers[-1] >= anatomy.layers:
        raise SteerError(
            f"{what} names layer {intervention.active_layers[-1]}",
            f"layers 0 to {anatomy.layers - 1} of this model",
            "Choose other layers",
        )
    if isinstance(intervention, ProjectOut) and intervention.heads:
        for layer, head in intervention.heads:
            if head >= anatomy.heads:
                raise SteerError(
                    f"{what} names head {head} of layer {layer}",
                    f"heads 0 to {anatomy.heads - 1} of this model",
                    "Choose other heads",
                )
    if not isinstance(intervention, Custom):
        expected = (anatomy.heads, anatomy.head_width) if intervention.site == "z" else (anatomy.hidden,)
        if intervention.direction.width != expected:
            raise SteerError(
                f"{what} has vectors of shape {intervention.direction.width}",
                f"{expected} in this model",
                "Make the direction from this model's own traces",
            )
