"""Who reads: a model as a collection sees it, and one way to put a batch of traces through it.

Plan, shards, groups and the folder of a summary are the same whoever reads. `probes.collect.hooked` reads with hooks on
a transformers model, for every recorder; `probes.collect.vllm` with an engine, for means and choices of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from probes.collect.recorders import Batch, Layers, Prepared, Recorder

if TYPE_CHECKING:
    from steer.anatomy.resolve import Anatomy
    from steer.identity import ModelIdentity
    from steer.marks import Marks


class Shaped(Protocol):
    """What the shapes of recorders ask of a model."""

    @property
    def name(self) -> str:
        """How it was loaded."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are, and how many."""
        ...


class Model(Shaped, Protocol):
    """What plan and summary ask of a model, whatever runs it; see `steer.model`."""

    @property
    def identity(self) -> ModelIdentity:
        """What values made from it are stamped with."""
        ...

    @property
    def marks(self) -> Marks:
        """What opens and closes its thinking."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        ...

    @property
    def change_ids(self) -> tuple[str, ...]:
        """One hash per change under which it is read."""
        ...


class Reader(Protocol):
    """Puts traces through a model and returns what recorders keep of them."""

    @property
    def model(self) -> Model:
        """The model that it reads."""
        ...

    @property
    def engine(self) -> Mapping[str, Any] | None:
        """What runs the model, for journal and provenance; None for this process, by hooks."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of the longest trace that it reads; None where nobody says."""
        ...

    def prepare(self, recorder: Recorder, layers: Layers) -> Prepared:
        """Return the recorder, knowing the model.

        Raises:
            SteerError: the model has no such site or span, or this reader cannot record it; says which can.
        """
        ...

    def read(self, prepared: Sequence[Prepared], batch: Batch) -> dict[str, list[Tensor]]:
        """Return every quantity of recorders that were prepared here: one tensor per trace, on the CPU."""
        ...

    def key(self) -> dict[str, Any] | None:
        """Return what says which numbers it reads, for the cache; None where that cannot be told."""
        ...
