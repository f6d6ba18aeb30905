"""Steerings and an engine's declaration, made by hand for tests that need no vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from steer.backends.vllm.config import Declared
from steer.backends.vllm.lowering import places_of
from steer.backends.vllm.store import Store
from steer.directions import Direction
from steer.interventions import Add, ProjectOut
from steer.marks import Marks
from steer.steering import Steering

HIDDEN, LAYERS = 6, 3
MARKS = Marks(opening=((3,), (7, 8)), closing=((4,), (7, 8, 9)))


def direction(layers: tuple[int, ...], site: str, seed: int, scale: float = 1.0) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    return Direction(torch.randn(len(layers), HIDDEN, generator=generator) * scale, layers, site)


@cache
def steerings() -> dict[str, Steering]:
    """One of each kind, in several phases."""

    def add(layers: tuple[int, ...], site: str, seed: int, phase: str = "all", a: float = 0.7) -> Add:
        return Add(direction(layers, site, seed), site, coefficient=a, phase=phase)

    return {
        "all": Steering((add((0, 2), "resid_post", 1),)),
        "thinking": Steering((add((1,), "resid_post", 2, "thinking"),)),
        "mixed": Steering(
            (
                add((0,), "attn_out", 3, "prompt"),
                ProjectOut(direction((1,), "mlp_out", 4), "mlp_out", weight=0.5, phase="generated"),
                add((1,), "mlp_out", 5, "answer", a=-2.0),
                add((2,), "resid_post", 6, "opening"),
            )
        ),
        "project": Steering((ProjectOut(direction((2,), "resid_post", 7), "resid_post"),)),
    }


def declared(store: Path, slots: int = 4, endings: tuple[tuple[int, ...], ...] = ()) -> Declared:
    """An engine that may run all of `steerings`."""
    places = sorted({place for steering in steerings().values() for place in places_of(steering)})
    return Declared(
        store=str(store),
        places=tuple(places),
        slots=slots,
        hidden=HIDDEN,
        layers=LAYERS,
        experts=0,
        chosen=0,
        parts={"attn_out": (("self_attn",), 1.0), "mlp_out": (("mlp",), 1.0)},
        marks=MARKS,
        endings=endings,
    )


def stored(folder: Path) -> dict[str, str]:
    """Put all of `steerings` into a store and return their fingerprints."""
    folder.mkdir(exist_ok=True)
    store = Store(folder)
    return {name: store.put(steering) for name, steering in steerings().items()}
