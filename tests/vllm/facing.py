"""One engine as a user has it: `.venv-vllm/bin/python -m tests.vllm.facing FOLDER` writes runs and refusals into FOLDER."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from steer import Add, Direction, Patch, ProjectOut, Prompt, Sampling, SteeredLLM, SteerError, Steering
from steer.backends.vllm.replies import Terms
from steer.targets import target_of
from steer.traces import Traces

MODEL = "organism:chain"
GREEDY = Sampling(temperature=0.0, max_new_tokens=40)
QUESTIONS = ("hey hi a = 3 ; b = a + 4 ; c = b * 2 ; ? c", "a = 5 ; b = a * 3 ; ? b", "b = 9 ; ? b")
BUDGETS = (1, 2, 5, 9)
WAYS: tuple[tuple[str | None, float, str | None], ...] = (
    (None, 1.0, None), ("add", 1.0, None), ("add", -2.0, None), ("thinking", 1.0, None), ("edit", 1.0, None),
    ("add", 0.5, "generated"), ("add", 0.0, None),
)  # fmt: skip


def direction(layers: tuple[int, ...], seed: int, scale: float) -> Direction:
    """A random direction of the organism's width."""
    random = torch.Generator().manual_seed(seed)
    width = target_of(MODEL).anatomy.hidden
    return Direction(scale * torch.randn(len(layers), width, generator=random), layers, "resid_mid")


def steerings() -> dict[str, Steering]:
    """What the engine is given by name."""
    return {
        "add": Steering((Add(direction((1, 2), 1, 0.7), "resid_post"), Add(direction((3,), 2, 0.5), "attn_out"))),
        "thinking": Steering((Add(direction((2,), 3, 0.9), "resid_post", phase="thinking"),)),
    }


def heads(strength: float = 1.0) -> Steering:
    """ThinkEdit's form: heads of two layers."""
    return Steering((ProjectOut(direction((1, 2), 4, 1.0), "head_out", strength, heads=((1, 0), (1, 3), (2, 1))),))


def late() -> Steering:
    """A steering that the engine hears of when it runs, at a place that was declared."""
    return Steering((Add(direction((2,), 5, 0.8), "resid_post", phase="generated"),), name="late")


def asked() -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Prompts, steerings, coefficients and phases of one batch: every way, on turning questions."""
    names, coefficients, phases = (list(each) for each in zip(*WAYS, strict=True))
    return [QUESTIONS[n % len(QUESTIONS)] for n in range(len(WAYS))], names, coefficients, phases


def main(folder: Path) -> None:
    """Run everything in one engine, with the prefix cache on."""
    from experiments.think_policies import parse_policy

    warnings.simplefilter("error", UserWarning)
    told: dict[str, Any] = {"refused": {}}
    with SteeredLLM(MODEL, steerings=steerings(), adapters={"edit": Patch.from_steering(heads())}) as llm:
        prompts, names, coefficients, phases = asked()
        options = {"sampling": GREEDY, "steering": names, "coefficient": coefficients, "phase": phases}
        llm.generate(prompts, **options).save(folder / "ways")
        llm.generate(list(QUESTIONS), sampling=GREEDY, steering=late(), coefficient=2.0).save(folder / "late")
        view = llm.with_("edit").with_("add", coefficient=0.5)
        view.generate(list(QUESTIONS), sampling=GREEDY).save(folder / "view")
        told["view"] = [[list(reply.tokens), reply.logprobs] for reply in view.greedy(list(QUESTIONS), 20)]
        told["beside"] = beside(llm)
        for tokens in BUDGETS:
            policy = parse_policy(f"budget:{tokens}", llm.marks, llm.tokenizer)
            llm.generate(list(QUESTIONS), sampling=GREEDY, policy=policy).save(folder / f"budget-{tokens}")
        sampled(llm, folder)
        streamed: list[int] = []
        one = llm.generate(
            [QUESTIONS[0]], sampling=GREEDY, on_token=lambda _prompt, _sample, token: streamed.append(token)
        )
        told["streamed"] = [streamed, list(one[0].completion_token_ids)]
        wrong = {
            "name": lambda: llm.generate([QUESTIONS[0]], steering="nobody"),
            "place": lambda: llm.generate(
                [QUESTIONS[0]], steering=Steering((Add(direction((0,), 6, 1.0), "mlp_out"),))
            ),
            "heads": lambda: llm.generate([QUESTIONS[0]], steering=heads()),
            "strength": lambda: llm.generate([QUESTIONS[0]], steering="edit", coefficient=0.5),
            "phase": lambda: llm.generate([QUESTIONS[0]], steering="edit", phase="thinking"),
            "policy": lambda: llm.generate([QUESTIONS[0]], policy=parse_policy("min:5", llm.marks, llm.tokenizer)),
            "marks": lambda: llm.generate(
                ["<think> a = 3"], policy=parse_policy("budget:5", llm.marks, llm.tokenizer), sampling=GREEDY
            ),
        }
        told["refused"] = {name: refusal(call) for name, call in wrong.items()}
        told["left"] = llm.llm.llm_engine.get_num_unfinished_requests()
    (folder / "told.json").write_text(json.dumps(told))


def beside(llm: SteeredLLM) -> list[Any]:
    """Unsteered greedy replies that were written in one batch with replies under an adapter."""
    plain, changed = [next(iter(llm._each(llm._asked(QUESTIONS[:1]), name).values())) for name in (None, "edit")]
    turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
    asked = [Prompt(f"{kind}-{n}", turn) for kind in "ab" for n, turn in enumerate(turns)]
    chosen = {prompt.id: plain if prompt.id[0] == "a" else changed for prompt in asked}
    replies = llm._written(asked, chosen, Terms(Sampling(temperature=0.0, max_new_tokens=20), logprobs=True))
    return [[list(reply.tokens), reply.logprobs] for reply in replies if reply.prompt.id[0] == "a"]


def sampled(llm: SteeredLLM, folder: Path) -> None:
    """Sample many replies, and some of them again in another company."""
    warm = Sampling(temperature=1.0, top_p=0.95, top_k=20, max_new_tokens=30)
    prompts = [Prompt(f"item-{number}", QUESTIONS[number % 3]) for number in range(6)]
    first = llm.generate(prompts, sampling=warm, samples=2, seed=3)
    again = llm.generate([prompts[4], prompts[1]], sampling=warm, samples=2, seed=3)
    Traces(first, first.meta).save(folder / "sampled")
    Traces(again, again.meta).save(folder / "again")


def refusal(call: Any) -> str:
    """Return what a call is refused with."""
    try:
        call()
    except SteerError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
