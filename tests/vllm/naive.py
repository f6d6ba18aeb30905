"""The independent answer: transformers' own model, plain forward hooks written by hand, everything computed again for
every token, no cache. Phases are told by looking the whole sequence over for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer import Add, BiasRouter, ProjectOut, ScaleExperts, Steering
from steer.marks import Marks
from tests.steer import naive_moe

GENERATED = ("opening", "thinking", "answer")


@dataclass(frozen=True)
class Reply:
    """Greedy tokens, the logarithms of their probabilities, and by how much each beat the next best."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def phase_at(tokens: Sequence[int], t: int, prompt: int, start: int, marks: Marks) -> str:
    """Name the phase of token t (docs/phases.md), by looking for the last mark that ends at t or before."""
    if t < prompt - 1:
        return "prompt"
    for end in range(t, start - 1, -1):
        kinds = {
            len(mark): kind
            for kind, several in (("thinking", marks.opening), ("answer", marks.closing))
            for mark in several
            if end - len(mark) + 1 >= start and tuple(tokens[end - len(mark) + 1 : end + 1]) == mark
        }
        if kinds:
            return kinds[max(kinds)]
    return "opening"


def holds(phase: str, at: str) -> bool:
    """Whether an intervention of `phase` acts on a token that belongs to `at`."""
    return phase in ("all", at) or (phase == "generated" and at in GENERATED)


@torch.no_grad()
def greedy(
    model: Any,
    prompt: Sequence[int],
    count: int,
    steering: Steering | None = None,
    coefficient: float = 1.0,
    phase: str | None = None,
    marks: Marks | None = None,
    start: int = 0,
) -> Reply:
    """Write `count` tokens; marks count from token `start` on; `phase` takes the place of every intervention's own."""
    tokens, phases = list(prompt), []
    reply = Reply([], [], [])
    with steered(model, steering, coefficient, phase, phases):
        for _ in range(count):
            phases[:] = [phase_at(tokens, t, len(prompt), start, marks or Marks()) for t in range(len(tokens))]
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            (best, second), (token, _) = torch.log_softmax(logits, -1).topk(2)
            tokens.append(int(token))
            reply.tokens.append(int(token))
            reply.logprobs.append(float(best))
            reply.margins.append(float(best - second))
    return reply


@contextmanager
def steered(
    model: Any, steering: Steering | None, coefficient: float, phase: str | None, phases: list[str]
) -> Iterator[None]:
    """Hook a model; `phases` says at every forward what each token belongs to."""
    with ExitStack() as stack:
        changes: dict[int, naive_moe.Change] = {}
        for each in () if steering is None else steering.interventions:
            when = each.phase if phase is None else phase
            if isinstance(each, ScaleExperts | BiasRouter):
                changes |= routed(each, coefficient, lambda t, when=when: holds(when, phases[t]))
                continue
            assert isinstance(each, Add | ProjectOut)
            for layer in each.active_layers:
                scale = 1.0 if each.site == "resid_post" else getattr(model.config, "residual_multiplier", 1.0)
                hook = hidden(each, each.direction[layer] / scale, coefficient, when, phases)
                module = place(model, each.site, layer)
                stack.callback(module.register_forward_hook(hook).remove)
        if changes:
            stack.enter_context(naive_moe.rewritten(model, changes))
        yield


def place(model: Any, site: str, layer: int) -> Any:
    """Return the module whose output a site is."""
    block = model.model.layers[layer]
    return {"resid_post": block, "attn_out": block.self_attn, "resid_mid": block.self_attn, "mlp_out": block.mlp}[site]


def hidden(each: Add | ProjectOut, vector: Tensor, c: float, when: str, phases: list[str]) -> Any:
    """Return a forward hook that changes a module's output where the phase holds."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        acts = torch.tensor([[holds(when, at)] for at in phases])
        if isinstance(each, Add):
            changed = h + c * each.coefficient * vector
        else:
            unit = vector / vector.norm()
            changed = h - c * each.weight * (h @ unit)[..., None] * unit
        h = torch.where(acts, changed, h).to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def routed(each: ScaleExperts | BiasRouter, c: float, acts: Any) -> dict[int, naive_moe.Change]:
    """Return what is done to the routers, by layer."""
    found = {}
    for layer in each.active_layers:
        if isinstance(each, ScaleExperts):
            factors = {expert: 1 + c * (each.beta - 1) for at, expert in each.experts if at == layer}
            found[layer] = naive_moe.Change(factors=factors, renormalise=each.renormalise, acts=acts)
        else:
            found[layer] = naive_moe.Change(
                bias={expert: number for at, expert, number in each.bias if at == layer},
                force_in=tuple(expert for at, expert in each.force_in if at == layer),
                force_out=tuple(expert for at, expert in each.force_out if at == layer),
                acts=acts,
            )
    return found
