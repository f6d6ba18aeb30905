"""`SteeredLLM` writes what the HF back end writes: tokens, spans, forced tokens and run folders, whoever runs beside whom."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import steer
from experiments.think_policies import parse_policy
from steer import Patch, Traces
from steer.backends.vllm.request import effective
from steer.backends.vllm.start import runnable
from steer.model import SteerableModel
from steer.sources import locate
from tests.vllm import facing
from tests.vllm.lab import ENVIRONMENT, LONGEST, PYTHON, ROOT, SAME

pytestmark = pytest.mark.vllm


def started(folder: Path, *words: str) -> str:
    """Run Python of the environment with vLLM and return stdout; what it said goes with a failure."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTHON", "STEER_"))}
    own = {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_CACHE_ROOT": str(folder / "cache" / "vllm"),
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [str(PYTHON), *words], cwd=folder, env={**inherited, **ENVIRONMENT, **own}, capture_output=True, text=True, timeout=LONGEST, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return run.stdout


@pytest.fixture(scope="module")
def told(shared_folder: Callable[[str], Path]) -> Path:
    """The folder in which one engine has left its runs."""
    folder = shared_folder("vllm-face")
    with FileLock(folder / "lock"):
        if not (folder / "told.json").is_file():
            started(folder, "-m", "tests.vllm.facing", str(folder))
    return folder


def refusals(told: Path) -> Any:
    return json.loads((told / "told.json").read_text())


@cache
def model() -> SteerableModel:
    return steer.load(facing.MODEL)


def check(view: SteerableModel, written: list[tuple[list[int], list[float]]]) -> None:
    """Greedy tokens are those of a view, and their logarithms of probabilities lie within 1e-5."""
    for question, (tokens, logprobs) in zip(facing.QUESTIONS, written, strict=True):
        prompt = view.render([{"role": "user", "content": question}])
        (logits,) = view.run([[*prompt.token_ids, *tokens]], [len(prompt.token_ids)], [prompt.generation_prompt_start])
        along = logits[len(prompt.token_ids) - 1 : -1].double().log_softmax(-1)
        assert along.argmax(-1).tolist() == tokens
        chosen = along.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((chosen - torch.tensor(logprobs)).abs().max()) <= SAME


def wide(folder: Path) -> SteerableModel:
    """The very copy that the engine read; at one token of these replies it is 1.3e-5 from the organism itself."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return steer.load(runnable(locate(facing.MODEL), processors=True))


def test_every_way_in_one_batch_writes_what_hooks_write(told: Path) -> None:
    found = Traces.load(told / "ways")
    given = {**facing.steerings(), "edit": None}
    plain = []
    for trace, prompt, name, coefficient, phase in zip(found, *facing.asked(), strict=True):
        view = model()
        if name == "edit":
            view = view.with_(Patch.from_steering(facing.heads()))
        elif name is not None and (acting := effective(given[name], coefficient, phase)) is not None:
            view = view.with_(acting)
        message = steer.Prompt(trace.item, [{"role": "user", "content": prompt}])
        (expected,) = view.generate([message], sampling=facing.GREEDY)
        assert trace == expected, (name, coefficient, phase)
        (unsteered,) = model().generate([message], sampling=facing.GREEDY)
        plain.append(trace == unsteered)
    assert plain[0] and plain[-1] and not all(plain), "nothing was steered"
    rows = found.meta["steering"]
    assert rows["00000"] is None and rows["00004"]["adapter"] == "edit"
    assert rows["00002"]["fingerprint"] == facing.steerings()["add"].scaled(-2.0).fingerprint
    assert (rows["00005"]["phase"], rows["00006"]["fingerprint"]) == ("generated", None)


def test_a_steering_that_comes_later_and_a_run_folder(told: Path) -> None:
    found = Traces.load(told / "late")
    expected = model().with_(facing.late(), coefficient=2.0).generate(list(facing.QUESTIONS), sampling=facing.GREEDY)
    assert list(found) == list(expected)
    assert found.meta["steering"]["steering"] == "late" and found.meta["backend"]["name"] == "vllm"
    shared = ("model", "tokenizer_id", "marks", "sampling", "samples", "policy", "seed", "thinking")
    assert {key: found.meta[key] for key in shared} == {key: expected.meta[key] for key in shared}


def test_a_view_has_an_adapter_and_a_steering_at_once(told: Path) -> None:
    patch = Patch.from_steering(facing.heads())
    view = model().with_(patch).with_(facing.steerings()["add"], coefficient=0.5)
    expected = view.generate(list(facing.QUESTIONS), sampling=facing.GREEDY)
    found = Traces.load(told / "view")
    assert list(found) == list(expected) and found.meta["changes"] == expected.meta["changes"]
    copied = wide(told)
    check(copied.with_(patch).with_(facing.steerings()["add"], coefficient=0.5), refusals(told)["view"])
    check(copied, refusals(told)["beside"])


@pytest.mark.parametrize("tokens", facing.BUDGETS)
def test_a_budget_is_the_same_budget(told: Path, tokens: int) -> None:
    policy = parse_policy(f"budget:{tokens}", model().marks, model().tokenizer)
    expected = model().generate(list(facing.QUESTIONS), sampling=facing.GREEDY, policy=policy)
    assert list(Traces.load(told / f"budget-{tokens}")) == list(expected)
    assert any(trace.forced for trace in expected) or tokens == max(facing.BUDGETS)


def test_samples_do_not_depend_on_their_company(told: Path) -> None:
    first, again = ({t.id: t.completion_token_ids for t in Traces.load(told / name)} for name in ("sampled", "again"))
    assert len(first) == 12 and len(again) == 4
    assert {name: first[name] for name in again} == again
    assert len(set(first.values())) > 4, "temperature 1 writes different replies"


def test_tokens_come_as_they_are_written(told: Path) -> None:
    streamed, whole = refusals(told)["streamed"]
    assert streamed == whole


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("name", ("no steering 'nobody'", "add, edit, thinking")),
        ("place", ("add at mlp_out of layers 0", "was not started for")),
        ("heads", ("no heads", "LoRA")),
        ("strength", ("coefficient 0.5", "patch.scaled")),
        ("phase", ("every token alike", "hook form")),
        ("policy", ("min:5", "HF back end")),
        ("marks", ("marks around thinking in its text", "HF back end")),
    ],
)
def test_what_is_refused_says_what_to_do(told: Path, name: str, words: tuple[str, ...]) -> None:
    said = refusals(told)
    assert all(word in said["refused"][name] for word in words), said["refused"][name]
    assert said["left"] == 0, "a refused call leaves a request in the engine"
