"""What is asked in every configuration: one batch of differently steered requests for each model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import steer
from steer import Add, BiasRouter, Direction, ProjectOut, ScaleExperts, Steering
from tests.vllm.lab import Ask, Bench

QUESTIONS = (
    "hey hi a = 3 ; b = a + 4 ; c = b * 2 ; ? c",
    "a = 5 ; b = a * 3 ; ? b",
    "hey a = 7 ; b = a - 2 ; c = b + 6 ; d = c * 2 ; ? d",
    "b = 9 ; ? b",
    "hi c = 2 ; d = c * 4 ; e = d - 3 ; ? e",
    "hey hi d = 1 ; a = d + 8 ; ? a",
    "e = 6 ; a = e * 2 ; b = a + 1 ; ? b",
    "hi a = 4 ; b = a * 4 ; c = b - 5 ; d = c + 3 ; ? d",
)


def direction(width: int, layers: tuple[int, ...], site: str, seed: int, norm: float) -> Direction:
    """A random direction; every layer's vector has the norm."""
    vectors = torch.randn(len(layers), width, generator=torch.Generator().manual_seed(seed))
    return Direction(norm * vectors / vectors.norm(dim=1, keepdim=True), layers, site)


def steerings(name: str, width: int, layers: int) -> dict[str, Steering]:
    """The steerings of a model, by name."""
    middle, last = layers // 2, layers - 1

    def random(site: str, seed: int, *at: int) -> Direction:
        return direction(width, at, site, seed, norm=2.0)

    found = {
        "add": Steering((Add(random("resid_post", 1, 1, middle), "resid_post"),)),
        "other": Steering((Add(random("resid_post", 2, 0, last), "resid_post"),)),
        "parts": Steering(
            (
                Add(random("resid_mid", 3, 1), "resid_mid", coefficient=0.7),
                ProjectOut(random("attn_out", 4, middle), "attn_out"),
                Add(random("mlp_out", 5, 0, middle), "mlp_out", phase="generated"),
                ProjectOut(random("resid_post", 6, middle), "resid_post", weight=0.8),
            )
        ),
    }
    if "moe" in name:
        found["experts"] = Steering((ScaleExperts(((2, 1), (2, 5), (3, 0)), 8.0),))
        found["kept-sum"] = Steering((ScaleExperts(((2, 3), (3, 2), (3, 6)), 16.0, renormalise=True),))
        found["router"] = Steering((BiasRouter(bias=((2, 4, 2.0),), force_in=((3, 7),), force_out=((3, 1),)),))
    return found


def undeclared(width: int) -> dict[str, Steering]:
    """Steerings in the store that an engine cannot run: at a layer that was not declared, and of another width."""
    return {
        "elsewhere": Steering((Add(direction(width, (1, 3), "mlp_out", 7, 1.0), "mlp_out"),)),
        "narrow": Steering((Add(direction(width // 2, (1,), "resid_post", 8, 1.0), "resid_post"),)),
    }


def bench(folder: Path, model: Path, name: str) -> Bench:
    """A bench with everything that `batch` asks for."""
    loaded = steer.load(str(model))
    own = steerings(name, loaded.anatomy.hidden, loaded.anatomy.layers)
    turn = [{"role": "user", "content": QUESTIONS[0]}]
    rendered = [loaded.render(turn, thinking=thinking) for thinking in (None, False)]
    endings = tuple(each.token_ids[each.generation_prompt_start :] for each in rendered)
    return Bench(folder, model, own, loaded.marks, endings, undeclared(loaded.anatomy.hidden))


def prompts(bench: Bench, thinking: bool | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Every question as tokens, and where its marks count."""
    loaded = steer.load(str(bench.model))
    rendered = [loaded.render([{"role": "user", "content": question}], thinking=thinking) for question in QUESTIONS]
    return [(each.token_ids, each.generation_prompt_start) for each in rendered]


def batch(bench: Bench, marked: bool = True) -> list[Ask]:
    """Eight requests: two unsteered, the others each steered in another way; of a mixture of experts three more.

    `marked`: whether one acts between marks.
    """
    asked = prompts(bench)
    ways: list[dict[str, object]] = [
        {},
        {"steering": "add"},
        {"steering": "add", "coefficient": -2.0},
        {"steering": "other", "coefficient": 0.5, "phase": "generated"},
        {},
        {"steering": "other", "phase": "prompt"},
        {"steering": "add", "coefficient": 0.5, "phase": "thinking" if marked else "all"},
        {"steering": "parts"},
    ]
    if "experts" in bench.steerings:
        ways += [{"steering": "experts"}, {"steering": "kept-sum", "phase": "generated"}, {"steering": "router"}]
    if "chain" not in bench.model.name:  # A random model opens no thought, so its prompt does, as some templates do.
        asked[6] = ((*asked[6][0], *bench.marks.opening[0]), asked[6][1])
    return [
        Ask(prompt, start=start, **way)  # type: ignore[arg-type]
        for way, (prompt, start) in zip(ways, (asked * 2)[: len(ways)], strict=True)
    ]


PHASES = ("opening", "thinking", "answer")


def thoughts(bench: Bench) -> list[Ask]:
    """Long replies of a model that opens and closes its own thought, and of one whose template has both marks already."""
    (prompt, start), (closed, end) = prompts(bench)[1], prompts(bench, thinking=False)[3]
    asks = [Ask(prompt, "other", 0.25, phase, start, tokens=70) for phase in PHASES]
    return [*asks, Ask(closed, "other", 0.25, "answer", end, tokens=70)]


def refused(bench: Bench) -> list[Ask]:
    """Requests that cannot be steered as they ask, among others that can."""
    prompt, _ = prompts(bench)[0]
    good = [Ask(prompt, "add"), Ask(prompt)]
    return [
        good[0],
        Ask(prompt, "nobody"),
        Ask(prompt, "elsewhere"),
        Ask(prompt, "narrow"),
        Ask(prompt, "add", phase="thinking", start=99),
        good[1],
    ]


def rounds(bench: Bench) -> dict[str, list[Ask]]:
    """What one engine of the organism is asked, for several tests."""
    asks, own = batch(bench), thoughts(bench)
    return {
        "plain": [ask.plain for ask in asks],
        "steered": asks,
        "thoughts": [*own, replace(own[1], start="chat")],
        "refused": refused(bench),
    }
