"""What an engine is told at start: which places may be steered, by how many steerings at once, where these lie.

It travels as `additional_config["steering"]`, which switches the plugin on in every process and makes vLLM keep the
compiled code of a steerable model apart from that of a plain one: vLLM's own key does not see a changed layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from steer import __version__
from steer.anatomy.resolve import Anatomy, Contributes
from steer.backends.vllm.capture import ROUTER
from steer.backends.vllm.capture import SITES as READABLE
from steer.backends.vllm.lowering import HIDDEN, KINDS, Place, places_of
from steer.errors import SteerError
from steer.identity import known_keys
from steer.interventions import Add, BiasRouter, Intervention, ProjectOut, ScaleExperts
from steer.marks import Marks
from steer.ranges import ranges
from steer.steering import Steering

KEY = "steering"
Part = tuple[tuple[str, ...], float]
"""Paths of a module inside a layer, of which each layer has one, and what multiplies its output before it is added."""


@dataclass(frozen=True)
class Declared:
    """What `additional_config["steering"]` holds.

    Attributes:
        store: folder of `steer.backends.vllm.store.Store`.
        places: (site, kind, layer) that requests may change; every other layer is left as vLLM made it.
        slots: different steerings (at their strengths) that one step can hold; at least max_num_seqs.
        hidden, layers, experts, chosen: numbers of the model.
        parts: `attn_out` and `mlp_out`: which module of a layer writes it.
        marks: of the tokenizer.
        endings: what the chat template may append for a reply, as tokens.
        capture: (site, layer) whose rows can be read.
        version: of this package.
    """

    store: str
    places: tuple[Place, ...]
    slots: int
    hidden: int
    layers: int
    experts: int
    chosen: int
    parts: Mapping[str, Part]
    marks: Marks = field(default_factory=Marks)
    endings: tuple[tuple[int, ...], ...] = ()
    capture: tuple[tuple[str, int], ...] = ()
    version: str = field(default=__version__)

    def __post_init__(self) -> None:
        for site, kind, layer in self.places:
            good = kind in KINDS and 0 <= layer < self.layers
            if not good or (kind in ("add", "project") and site not in HIDDEN):
                raise SteerError(
                    f"the place ({site}, {kind}, {layer}) was declared",
                    f"add or project at {', '.join(HIDDEN)}, scale at router, bias at router_logits, layers 0 to {self.layers - 1}",
                )
        for site, layer in self.capture:
            if site not in (*READABLE, ROUTER) or not 0 <= layer < self.layers:
                raise SteerError(
                    f"the place ({site}, {layer}) was to be read",
                    f"one of {', '.join((*READABLE, ROUTER))}, layers 0 to {self.layers - 1}",
                    "The HF back end reads every site: leave vllm: and --backend vllm out",
                )
        if self.slots < 1:
            raise SteerError(f"{self.slots} slots were declared", "at least 1")

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        store: str | Path,
        steerings: Iterable[Steering] = (),
        *,
        slots: int,
        places: Iterable[Place] = (),
        capture: Iterable[tuple[str, int]] = (),
        marks: Marks | None = None,
        endings: Iterable[Iterable[int]] = (),
    ) -> Declared:
        """Declare what steerings need, and further places.

        Args:
            anatomy: of the model.
            store: folder of the store.
            steerings: what is to run; each is checked against the model.
            slots: as above.
            places: further (site, kind, layer).
            capture: as above.
            marks: of the tokenizer; None: none.
            endings: as above.

        Raises:
            SteerError: a steering does not fit the model or has no form in vLLM; a place that cannot be.
        """
        needed = set(places)
        for steering in steerings:
            steering.check(anatomy)
            needed |= set(places_of(steering))
        return cls(
            store=str(Path(store).absolute()),
            places=tuple(sorted(needed)),
            slots=slots,
            hidden=anatomy.hidden,
            layers=anatomy.layers,
            experts=anatomy.experts,
            chosen=anatomy.chosen,
            parts={
                "attn_out": _part(_attention(anatomy), anatomy.attention_contribution),
                "mlp_out": _part((anatomy.record.layer.mlp,), anatomy.mlp_contribution),
            },
            marks=Marks() if marks is None else marks,
            endings=tuple(tuple(int(token) for token in ending) for ending in endings),
            capture=tuple(sorted({(site, int(layer)) for site, layer in capture})),
        )

    def check_places(self, steering: Steering) -> None:
        """Refuse a steering that needs a place which was not declared, or whose vectors or experts another model has.

        Raises:
            SteerError: it does, or vLLM has no form for it.
        """
        for each in steering.interventions:
            self._check_size(each)
        missing = sorted(set(places_of(steering)) - set(self.places))
        if missing:
            site, kind, _ = missing[0]
            layers = [layer for at, what, layer in missing if (at, what) == (site, kind)]
            declared = [layer for at, what, layer in self.places if (at, what) == (site, kind)]
            raise SteerError(
                f"the steering needs {kind} at {site} of layers {ranges(layers)}, which the engine was not started for",
                f"layers {ranges(declared)}" if declared else "a place that was declared at start",
                "Start the engine with this steering among those it is given, or declare the place",
            )

    def _check_size(self, each: Intervention) -> None:
        what = f"{type(each).__name__} at {each.site}"
        if isinstance(each, Add | ProjectOut) and each.direction.width != (self.hidden,):
            raise SteerError(
                f"{what} has vectors of shape {each.direction.width}",
                f"({self.hidden},), the hidden size of the model that this engine runs",
                "Make the direction from this model's own traces",
            )
        if isinstance(each, ScaleExperts | BiasRouter):
            layer, expert = max(each.experts, key=itemgetter(1))
            if expert >= self.experts:
                raise SteerError(
                    f"{what} names expert {expert} of layer {layer}",
                    f"one of the {self.experts} experts that each layer of this engine's model has",
                    "Choose other experts",
                )

    def to_config(self) -> dict[str, Any]:
        """Return `additional_config`."""
        plain = asdict(self) | {"marks": self.marks.to_dict(), "parts": dict(self.parts)}
        return {KEY: _lists(plain)}

    @classmethod
    def from_config(cls, additional_config: Any) -> Declared | None:
        """Read `additional_config`; None where it does not ask for steering.

        Raises:
            SteerError: an unknown key, or another version of this package wrote it.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise SteerError(f"additional_config has steering = {given!r}", "what Declared.to_config returns")
        known_keys(given, cls.__dataclass_fields__, "additional_config['steering']")
        plain = dict(given)
        if plain.get("version") != __version__:
            raise SteerError(
                f"the engine was configured by reasoning-steer {plain.get('version')}",
                f"{__version__}, which runs here",
                "Install one version in every process of the engine",
            )
        plain["places"] = tuple((str(site), str(kind), int(layer)) for site, kind, layer in plain["places"])
        plain["capture"] = tuple((str(site), int(layer)) for site, layer in plain["capture"])
        plain["endings"] = tuple(tuple(ending) for ending in plain["endings"])
        plain["parts"] = {site: (tuple(paths), float(scale)) for site, (paths, scale) in plain["parts"].items()}
        plain["marks"] = Marks.from_dict(plain["marks"])
        return cls(**plain)


def _attention(anatomy: Anatomy) -> tuple[str, ...]:
    linear = anatomy.record.linear_layer
    return (anatomy.record.layer.attention, *(() if linear is None else (linear.attention,)))


def _part(modules: tuple[str, ...], contribution: Contributes) -> Part:
    if contribution.kind == "norm":
        return (contribution.norm,), 1.0
    return modules, contribution.multiplier if contribution.kind == "scale" else 1.0


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
