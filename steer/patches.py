"""Patch: operations on named matrices of a model, and what they expect to find.

A patch says what it wants in logical names (layer 12, attention_output, heads 3 and 5), never in names of a
family or of a file. It runs in memory (`patch.on`), becomes a checkpoint (`patch.plan(folder).apply(out)`), and
has a hook form (`patch.steering`). The arithmetic is in `steer.operations`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steer import artifacts, baking
from steer.anatomy.resolve import Anatomy
from steer.errors import SteerError
from steer.identity import ModelIdentity, canonical, check_same, mix
from steer.in_memory import patched
from steer.interventions import ProjectOut
from steer.operations import Matrix, Operation, ProjectColumns, Survival, edited, low_rank
from steer.operations.stored import content_of, operations_of, stored
from steer.steering import Steering

if TYPE_CHECKING:
    from steer.model import SteerableModel

__all__ = ["Matrix", "Operation", "Patch", "ProjectColumns", "edited", "low_rank"]


class Planned(Protocol):
    """What `edits.checkpoint.plan.Plan` offers; `steer` does not know that package, not even for its types."""

    @property
    def coverage(self) -> str:
        """What is touched, counted against what exists."""
        ...

    @property
    def bytes_to_write(self) -> int:
        """Size of the output."""
        ...

    def apply(
        self,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        link: bool = False,
        keep_undo: bool = False,
        hash_all: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> os.PathLike[str]:
        """Write the edited checkpoint into the new folder `out`."""
        ...


@dataclass(frozen=True, eq=False)
class Patch:
    """Operations on named matrices, and what they expect to find.

    Args:
        operations: at least one; those on one matrix act in this order.
        model: the model that it was made on; another shape is refused, None fits whatever has the matrices.
        expects: hash of a matrix's bytes before the patch (`tensor_hash`), where known; see `edits.checkpoint.apply.pin`.
        provenance: how it was made; JSON values only.
        config: values of config.json by dotted key (`set_config`); they take effect when a checkpoint is loaded, so
            `on` refuses them.

    Raises:
        SteerError: there is no operation and no configuration.
    """

    operations: tuple[Operation, ...]
    model: ModelIdentity | None = None
    expects: Mapping[Matrix, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.operations and not self.config:
            raise SteerError(
                "the patch has no operation, so it would leave the model as it is", "at least one head or matrix"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        heads = {(operation.matrix, head) for operation in self.operations for head in operation.heads or ()}
        parts = [f"{len(self.matrices)} matrices", *([f"{len(heads)} heads"] if heads else [])]
        return f"patch {self.fingerprint[:12]}: {', '.join(parts)}, {len(self.operations)} operations"

    @property
    def matrices(self) -> dict[Matrix, tuple[Operation, ...]]:
        """The operations of every touched matrix, matrices in order of layer."""
        found: dict[Matrix, tuple[Operation, ...]] = {}
        for operation in self.operations:
            found[operation.matrix] = (*found.get(operation.matrix, ()), operation)
        return dict(sorted(found.items()))

    @property
    def fingerprint(self) -> str:
        """Hash of what the patch does: the operations and their tensors, not where they came from."""
        digest = hashlib.sha256()
        for operations in self.matrices.values():
            for operation in operations:
                digest.update(canonical([operation.as_json(), operation.digest()]).encode())
        if self.config:
            digest.update(canonical({"config": dict(self.config)}).encode())
        return digest.hexdigest()

    def scaled(self, scale: float) -> Patch:
        """Return the patch with the weight of every operation multiplied by `scale`.

        Raises:
            SteerError: values or a configuration are set and the scale is neither 0 nor 1.
        """
        if self.config and scale not in (0, 1):
            raise SteerError(
                f"the patch sets {', '.join(self.config)} in config.json and was asked for with scale {scale}",
                "1, or 0 to leave it out, since a value is set or not",
                "Leave the configuration out of the patch that is scaled",
            )
        config = self.config if scale else {}
        return replace(self, operations=tuple(each.scaled(scale) for each in self.operations), config=config)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the patch as one artifact: a vector per operation, and the operations in its provenance.

        Raises:
            SteerError: the name does not end in `.safetensors`, or is taken.
            OSError: the disk refuses.
        """
        rows, tensors = stored(self.operations)
        content = {
            "operations": rows,
            "expects": {matrix.key: value for matrix, value in sorted(self.expects.items())},
            "config": dict(self.config),
        }
        story = {key: value for key, value in self.provenance.items() if key in artifacts.GIVEN}
        model = None if self.model is None else self.model.to_dict()
        artifacts.write(path, "patch", tensors, story | {"model": model, "content": content}, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read what `save` wrote.

        Raises:
            SteerError: no such file, damaged, of another kind, or with an operation that this version does not know.
        """
        found = artifacts.read(path, "patch", mapped=True)
        content = content_of(found.provenance["content"], path)
        operations = operations_of(content["operations"], found.tensors, path)
        expects = {Matrix.parse(key): value for key, value in content["expects"].items()}
        story = {key: found.provenance[key] for key in artifacts.GIVEN if key not in ("model", "content")}
        return cls(operations, found.model, expects, story, content["config"])

    def plan(
        self,
        folder: str | os.PathLike[str],
        anatomy: str | os.PathLike[str] | None = None,
        *,
        dtype: str | None = None,
        force_base: bool = False,
        untie: bool = False,
    ) -> Planned:
        """Say what the patch would do to the checkpoint in `folder`; headers only, nothing is written.

        See `edits.checkpoint.plan.plan`. `edits` sits above `steer`, so its room is looked up by name when it is needed.
        """
        room = importlib.import_module("edits.checkpoint.plan")
        made: Planned = room.plan(self, folder, anatomy, dtype=dtype, force_base=force_base, untie=untie)
        return made

    def export_lora(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
        """Write the patch as a LoRA adapter for the checkpoint in `folder`.

        See `edits.lora.export_lora`, which is looked up by name as in `plan`.

        Raises:
            SteerError: something in it is no product of low rank; `out` exists.
        """
        importlib.import_module("edits.lora").export_lora(self, folder, out)

    def steering(self) -> Steering:
        """Return the hook form: `ProjectOut` at `head_out`, one intervention for all layers that share a weight.

        Both forms get their arithmetic from `steer.operations`, so overlapping operations compose alike.
        """
        return baking.hook_form(self.matrices, self.model, str(self.provenance.get("site") or "resid_mid"))

    @classmethod
    def from_steering(
        cls, steering: Steering, model: SteerableModel | Anatomy | str | Path | None = None, *, untie: bool = False
    ) -> Patch:
        """Return the patch that does what a steering does; see `steer.baking`.

        Args:
            steering: its interventions must have a patch form on the model (the table of `steer.form_table`).
            model: a loaded model, its anatomy, or a checkpoint, of which headers are read; may be left out where every
                intervention is a `ProjectOut` at `head_out`.
            untie: the checkpoint will be written with a vocabulary head of its own, so a tied embedding may change.

        Raises:
            SteerError: an intervention has no patch form there; what has, or which form does, is named.
        """
        return cls(
            baking.operations_for(steering, model, untie),
            steering.model,
            provenance={"parents": [steering.fingerprint]},
        )

    @classmethod
    def compose(cls, *patches: Patch) -> Patch:
        """Return one patch that acts as these do one after the other; see `steer.conflicts.conflicts` on their order.

        The result is rounded once, where patches applied one after the other are rounded each.

        Raises:
            SteerError: none is given, they were made for different shapes, expect different weights in a matrix, or set
                a key of the configuration to different values.
        """
        if not patches:
            raise SteerError("no patch was given to compose", "at least one")
        model: ModelIdentity | None = None
        expects: dict[Matrix, str] = {}
        config: dict[str, Any] = {}
        for patch in patches:
            model = mix(model, patch.model, "the patches")
            _agree(expects, patch.expects, "are made for different weights of")
            _agree(config, patch.config, "set different values of")
        operations = tuple(operation for patch in patches for operation in patch.operations)
        parents = [patch.fingerprint for patch in patches]
        return cls(operations, model, expects, {"parents": parents}, config)

    def _refuse_hooked(self, model: SteerableModel) -> None:
        """A hook at head_out works on the weights as they are, so it cannot come before a patch of the same heads."""
        for change, coefficient in model.taps.entered:
            for each in getattr(change, "interventions", ()):
                hooked = each.heads or () if isinstance(each, ProjectOut) and not each.is_zero(coefficient) else ()
                for layer, head in hooked:
                    named = model.anatomy.in_memory(Matrix(layer, "attention_output")).name
                    operations = [
                        operation
                        for operation in self.operations
                        if operation.weight and model.anatomy.in_memory(operation.matrix).name == named
                    ]
                    if any(operation.heads is None or head in operation.heads for operation in operations):
                        raise SteerError(
                            f"head {head} of layer {layer} is edited by a hook that was entered before the patch",
                            "the patch first, since the hook edits what the weights then are",
                            "Enter the patch first: m.with_(patch, steering); or use two patches, or two steerings",
                        )

    @contextmanager
    def on(self, model: SteerableModel, scale: float = 1.0) -> Iterator[dict[Matrix, Survival]]:
        """Patch a loaded model while the context is open; afterwards every byte is as before.

        Contexts may be nested and may end in any order: at every moment the weights are the original ones after
        the operations of all open contexts, in the order in which they were opened, cast once.

        Args:
            model: its touched weights must be in memory, unquantised.
            scale: multiplies the weight of every operation; 0 leaves every byte as it is.

        Yields:
            How much of the wanted change survived the cast, for every matrix.

        Raises:
            SteerError: another model's shape; a weight that is quantised or not in memory; a head that an open hook at
                `head_out` edits already.
        """
        check_same(self.model, model.identity, "the patch")
        if self.config:
            raise SteerError(
                f"the patch sets {', '.join(self.config)} in config.json",
                "operations on weights alone, since a configuration takes effect when a model is loaded",
                "Apply it to the checkpoint, `patch.plan(folder).apply(out)`, and load the result",
            )
        scaled = self.scaled(scale)
        scaled._refuse_hooked(model)
        with model.taps.entering(self, scale), patched(model, scaled.matrices) as survived:
            yield survived


def _agree(found: dict[Any, Any], more: Mapping[Any, Any], what: str) -> None:
    """Take `more` into `found`, where both say the same of what they share."""
    for key, value in more.items():
        if found.setdefault(key, value) != value:
            raise SteerError(
                f"the patches {what} {key}: {found[key]!r} and {value!r}",
                "one for both",
                "Apply them one after the other, or make them on the same model",
            )
