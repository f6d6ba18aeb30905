"""The face of the vLLM back end, as far as no engine is needed: what acts, what is written beside it, what is left behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steer
from steer import Add, Direction, Patch, ProjectOut, Sampling, ScaleExperts, SteerError, Steering
from steer.backends.vllm import adapters, start
from steer.backends.vllm.choice import Choice, kept, named, of_steerings, per_prompt, the_adapter
from steer.backends.vllm.known import Known
from steer.backends.vllm.llm import SteeredLLM
from steer.backends.vllm.replies import Reply, Terms, run, seed_of
from steer.backends.vllm.store import Store
from steer.marks import Marks
from steer.model import SteerableModel
from steer.prompts import Prompt, Rendered
from steer.sampling import end_tokens
from steer.sources import Source, locate
from steer.subjects import load_change
from tests.steer.made import refused

MODEL = "organism:chain"


@pytest.fixture(scope="module")
def model() -> SteerableModel:
    return steer.load(MODEL)


def add(seed: int, site: str = "resid_post", phase: str = "all") -> Steering:
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(seed))
    return Steering((Add(Direction(vectors, (1, 2), "resid_mid"), site, phase=phase),), name=f"s{seed}")


def heads() -> Steering:
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(9))
    return Steering((ProjectOut(Direction(vectors, (1, 2), "resid_mid"), "head_out", heads=((1, 0), (2, 3))),))


def adapter(name: str) -> adapters.Adapter:
    return adapters.Adapter(name, Path("/nowhere"), 1, 1, "f")


# What acts.


def test_a_view_and_a_call_act_one_after_the_other_as_hooks_do(model: SteerableModel) -> None:
    ids, length, begin = [[1, 5, 9, 14, 3, 7, 4, 8]], [4], [0]
    first, second, third = add(1), add(2, "attn_out", "thinking"), add(3, "mlp_out")
    found = of_steerings([(first, 0.5), (second, -2.0)], third, 1.5, "generated")
    assert found is not None and found[1:] == (1.0, None) and found[0].name == "s1 + s2 + s3"
    (joined,) = model.with_(found[0]).run(ids, length, begin)
    third = Steering((Add(third.directions[0], "mlp_out", phase="generated"),))
    view = model.with_(first, coefficient=0.5).with_(second, coefficient=-2.0).with_(third, coefficient=1.5)
    (apart,) = view.run(ids, length, begin)
    assert torch.equal(joined, apart)
    assert not torch.equal(joined, model.run(ids, length, begin)[0])


def test_a_single_steering_keeps_its_strength_for_the_request(tmp_path: Path) -> None:
    assert of_steerings([], add(1), 2.0, "answer") == (add(1), 2.0, "answer")
    assert of_steerings([(add(1), 0.5)], None, 1.0, None) == (add(1), 0.5, None)
    assert of_steerings([], None, 1.0, None) is None
    assert of_steerings([(add(1), 0.0), (add(2), 0.0)], None, 1.0, None) is None
    choice = kept(add(1), -2.0, None, Store(tmp_path), "name", None)
    assert (choice.base, choice.fingerprint) == (add(1).fingerprint, add(1).scaled(-2.0).fingerprint)
    assert choice.extra(7) == {
        "steering": "name",
        "steering_base": add(1).fingerprint,
        "steering_coefficient": -2.0,
        "steering_prompt": 7,
    }
    assert Choice().extra(7) == {} and kept(add(1), 0.0, None, Store(tmp_path), "n", None).fingerprint is None


def test_an_adapter_is_what_it_is() -> None:
    one = adapter("one")
    assert the_adapter([]) is None and the_adapter([(one, 1.0, None)]) is one
    for asked, word in (([(one, 0.5, None)], "coefficient 0.5"), ([(one, 1.0, "answer")], "phase 'answer'"), ([(one, 1.0, None), (adapter("two"), 1.0, None)], "'one', 'two'")):  # fmt: skip
        with pytest.raises(SteerError, match=word):
            the_adapter(asked)  # type: ignore[arg-type]
    assert named("one", {}, {"one": one}) is one
    with pytest.raises(SteerError, match="s1, two"):
        named("one", {"s1": add(1)}, {"two": adapter("two")})


def test_lists_have_one_entry_per_prompt() -> None:
    assert per_prompt("a", 3, "steerings") == ["a"] * 3 and per_prompt([1, 2], 2, "c") == [1, 2]
    with pytest.raises(SteerError, match="2 steerings were given for 3 prompts"):
        per_prompt(["a", "b"], 3, "steerings")


# Before an engine.


def test_what_is_known_without_weights_is_what_loading_says(model: SteerableModel) -> None:
    known = Known.of(MODEL)
    assert (known.identity, known.marks) == (model.identity, model.marks)
    assert known.anatomy.numbers() == model.anatomy.numbers()
    told: Any = known
    assert end_tokens(told) == end_tokens(model)
    told = type("Engine", (), {"card": known.source.card, "generation_config": known.generation_config})()
    assert Sampling.of(told) == Sampling.of(model)


def test_narrow_heads_run_from_a_copy_that_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = locate(MODEL)
    assert start.runnable(source, processors=False) == source.folder
    copy = start.runnable(source, processors=True)
    assert copy.parent == tmp_path / "reasoning-steer" / "vllm" and "heads of 16" in capsys.readouterr().err
    written = (copy / "model.safetensors").stat().st_mtime_ns
    assert start.runnable(source, processors=True) == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert start.runnable(Source("copy", copy), processors=True) == copy, "wide enough now"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_the_callers_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*start.ON_PROCESSORS, "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    known, here = Known.of(MODEL), start.Machine("0.32.0", "cpu")
    folder = known.source.folder
    own = start.options(folder, here, {}, True, known.marks, known.tokenizer)
    assert (own["max_num_seqs"], own["enforce_eager"], own["model"]) == (32, True, str(folder))
    assert own["dtype"] == "float32", "as it is stored"
    assert own["reasoning_config"] == {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    given = {"max_num_seqs": 7, "enforce_eager": False, "tensor_parallel_size": 2, "reasoning_parser": "qwen3"}
    told = start.options(folder, here, given, False, known.marks, known.tokenizer)
    assert {name: told[name] for name in given} == given and "reasoning_config" not in told
    gpu = start.options(folder, start.Machine("0.32.0", "cuda"), {}, False, known.marks, known.tokenizer)
    assert gpu["max_num_seqs"] == 256 and "enforce_eager" not in gpu
    several = Marks(((3,), (5, 6)), ((4,),))
    assert start.mark_texts(several, known.tokenizer) is None and start.mark_texts(Marks(), known.tokenizer) is None


def test_without_vllm_everything_imports_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, steer; steer.SteeredLLM; print(*(m for m in sys.modules if m == 'vllm' or m.startswith('vllm.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(SteerError, match=r"pip install 'reasoning-steer\[vllm\]'"):
        steer.SteeredLLM("organism:chain")


# Adapters.


@pytest.mark.parametrize("form", ["patch", "steering"])
def test_an_adapter_is_written_for_the_copy_and_does_what_the_hook_does(
    model: SteerableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = start.runnable(locate(MODEL), processors=True)
    change = Patch.from_steering(heads(), model) if form == "patch" else heads()
    (made,) = adapters.prepared({"edit": change}, folder, model.identity, tmp_path, own=False).values()
    assert (made.name, made.rank, made.number) == ("edit", 1, 1)
    assert made.fingerprint == Patch.from_steering(heads(), model).fingerprint
    ids = [[1, 5, 9, 14, 3, 7]]
    (hooked,) = model.with_(heads()).run(ids)
    wide = steer.load(folder)
    (adapted,) = wide.with_(load_change(made.folder, str(folder))).run(ids)
    assert float((adapted - hooked).abs().max()) < 1e-4 < float((model.run(ids)[0] - hooked).abs().max())
    assert adapters.options([made], processors=False, experts=8) == {
        "enable_lora": True,
        "max_lora_rank": 1,
        "max_loras": 1,
        "max_cpu_loras": 1,
    }
    assert adapters.only([made]) == {"lora_target_modules": ["o_proj"]} and adapters.only([]) == {}
    empty_beside = adapters.options([made] * 9, processors=True, experts=0)
    assert (empty_beside["max_loras"], empty_beside["max_cpu_loras"]) == (10, 10)
    with pytest.raises(SteerError, match="runs experts by a Triton kernel only"):
        adapters.options([made], processors=True, experts=8)
    taking_turns = adapters.options([made] * 9, processors=False, experts=8)
    assert (taking_turns["max_loras"], taking_turns["max_cpu_loras"]) == (adapters.TOGETHER, 9)
    with pytest.raises(SteerError, match="another width"):
        adapters.prepared({"edit": made.folder}, folder, model.identity, tmp_path, own=False)
    (again,) = adapters.prepared({"edit": made.folder}, folder, model.identity, tmp_path, own=True).values()
    assert again.folder == made.folder and again.rank == 1


def test_what_is_no_adapter_names_the_way_that_it_has(tmp_path: Path) -> None:
    known = Known.of("organism:chain-moe")
    experts = Steering((ScaleExperts(((known.anatomy.expert_layers[0], 1),), 4.0),))
    with pytest.raises(SteerError, match="steer apply"):
        adapters.prepared({"up": experts}, known.source.folder, known.identity, tmp_path, own=True)
    assert adapters.options([], processors=True, experts=0) == {}
    with pytest.raises(SteerError, match="rank 600"):
        adapters.options([adapters.Adapter("a", tmp_path, 600, 1, "f")], processors=True, experts=0)
    with pytest.raises(SteerError, match="says no rank"):
        adapters.rank_of(tmp_path)


# Requests.


@dataclass
class Output:
    request_id: str
    token_ids: list[int]
    finished: bool
    logprobs: None = None

    @property
    def finish_reason(self) -> str | None:
        return "stop" if self.finished else None

    @property
    def outputs(self) -> list[Output]:
        return [self]


@dataclass
class Engine:
    """Writes the tokens 10, 11, 12 for every request, one a step; falls at a step if told so."""

    falls: int = -1
    held: dict[str, list[int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    steps: int = 0

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any = None) -> None:
        if params == "refused":
            raise SteerError("refused")
        self.held[name] = [10, 11, 12]

    def has_unfinished_requests(self) -> bool:
        return bool(self.held)

    def step(self) -> list[Output]:
        self.steps += 1
        if self.steps == self.falls:
            raise KeyboardInterrupt
        written = [Output(name, [left.pop(0)], not left) for name, left in self.held.items()]
        self.held = {name: left for name, left in self.held.items() if left}
        return written

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names


def replies(count: int) -> list[Reply]:
    return [Reply(Prompt(f"i{n}", "a"), Rendered((1, 2), 0), 0, 8) for n in range(count)]


def test_replies_are_filled_and_told_of() -> None:
    told, streamed, made = [], [], replies(2)
    run(
        Engine(), made, ["", ""], told.append, lambda prompt, sample, token: streamed.append((prompt.id, sample, token))
    )
    assert [(reply.tokens, reply.finish) for reply in made] == [([10, 11, 12], "stop")] * 2
    assert [(state.done, state.total, state.tokens) for state in told] == [(1, 2, 3), (2, 2, 6)]
    assert streamed[:2] == [("i0", 0, 10), ("i1", 0, 10)] and len(streamed) == 6


def test_nothing_stays_in_the_engine_after_a_refusal_or_an_interruption() -> None:
    engine = Engine()
    with pytest.raises(SteerError):
        run(engine, replies(3), ["", "", "refused"])
    assert engine.aborted == ["0-i0/0", "1-i1/0"]
    engine = Engine(falls=2)
    with pytest.raises(KeyboardInterrupt):
        run(engine, replies(2), ["", ""])
    assert engine.aborted == ["0-i0/0", "1-i1/0"]


def test_every_reply_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, item, sample) for seed in (0, 1) for item in ("a", "b", "ä") for sample in (0, 1)}
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "a", 0) == seed_of(0, "a", 0)


def test_terms_that_vllm_would_change_are_refused() -> None:
    with pytest.raises(SteerError, match=r"temperature is 0\.005"):
        Terms(Sampling(temperature=0.005))
    with pytest.raises(SteerError, match="Samples is 0"):
        Terms(Sampling(), samples=0)


def test_a_reply_that_ended_otherwise_is_no_trace() -> None:
    (reply,) = replies(1)
    reply.finish = "abort"
    with pytest.raises(SteerError, match="'abort'"):
        reply.trace(None, Marks(), None)


def test_nothing_is_asked_of_an_engine_that_was_stopped(tmp_path: Path, model: SteerableModel) -> None:
    stopped: list[bool] = []
    core = SimpleNamespace(shutdown=lambda: stopped.append(True))
    llm: Any = SteeredLLM.__new__(SteeredLLM)
    llm.llm, llm.identity = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), model.identity
    llm._scratch = TemporaryDirectory(dir=tmp_path)
    view = copy.copy(llm)
    llm.close()
    llm.close()
    refused(lambda: view.read([]), "organism:chain was stopped")
    assert stopped and not list(tmp_path.iterdir())
