"""Collecting with vLLM, without vLLM: an engine that is played by hooks, in chunks and by two stages of a pipeline."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import steer
from probes.collect.means import HeadMeans, SpanMeans
from probes.collect.routing import RouterCounts
from probes.collect.run import collect
from probes.collect.segments import SegmentMeans
from probes.collect.summary import Summary
from probes.collect.vllm import VllmReader, places
from probes.experts.score import expert_scores
from steer import artifacts
from steer.backends.vllm.capture import KEY, Place, Taken, Wanted
from steer.backends.vllm.capture_read import buffer_bytes, read
from steer.backends.vllm.capture_worker import Captured
from steer.cli import app
from steer.errors import SteerError
from steer.identity import UNKNOWN
from steer.model import SteerableModel
from steer.subjects import open_subject
from steer.traces import Trace, Traces
from tests.probes import made

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SPANS = ("predicts_thinking", "thinking", "answer", "marker:;")
MEANS = SpanMeans(SITES, SPANS)
COUNTS = RouterCounts(("all", "thinking", "marker:<think>@all"))


@dataclass
class Played:
    """`vllm.LLM` with two stages; runs each prompt in chunks of 7, hooks give the rows."""

    model: SteerableModel
    places: Sequence[Place]
    asked: list[dict[str, Any]] = field(default_factory=list)
    fails: bool = False
    ends: str = "length"

    def __post_init__(self) -> None:
        numbers = self.model.anatomy
        half = numbers.layers // 2
        self.stages = [
            Captured(
                [place for place in self.places if (place[1] < half) == (stage == 0)],
                tokens=8,
                hidden=numbers.hidden,
                experts=numbers.experts,
                chosen=numbers.chosen,
                dtype=torch.float32,
                device="cpu",
            )
            for stage in (0, 1)
        ]

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], use_tqdm: bool, lora_request: Any) -> list[Any]:
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            assert each.skip_reading_prefix_cache
            assert each.max_tokens == 1
            self.asked.append(each.extra_args)
            self._run(str(number), prompt["prompt_token_ids"], each.extra_args)
            if self.fails:
                raise ValueError("the engine refuses")
        return [SimpleNamespace(outputs=[SimpleNamespace(finish_reason=self.ends)]) for _ in prompts]

    def _run(self, name: str, tokens: list[int], extra: dict[str, Any]) -> None:
        with self.model.capture(dict.fromkeys(site for site, _ in self.places)) as acts:
            self.model.run([tokens])
        for stage in self.stages:
            stage.add(name, extra)
            for first in range(0, len(tokens), 7):
                count = min(7, len(tokens) - first)
                for (site, layer), buffer in stage.rows.items():
                    buffer[1 : 1 + count] = acts[site][layer][0, first : first + count]
                for layer, (ids, weights) in stage.routers.items():
                    routing = acts["router"][layer]
                    ids[1 : 1 + count] = routing.ids[0, first : first + count]
                    weights[1 : 1 + count] = routing.weights[0, first : first + count]
                stage.ran(name, 1, count, first)
            stage.remove(name)

    def collective_rpc(self, name: str, args: tuple[list[str]]) -> list[dict[str, bytes]]:
        assert name == "steer_captured"
        return [stage.take(*args) for stage in self.stages]


@pytest.fixture(autouse=True)
def _parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def view_of(
    model: SteerableModel, declared: Sequence[Place], asked: Mapping[str, Any] | None = None, **told: Any
) -> Any:
    """What stands in for a view of `SteeredLLM`."""
    played = Played(model, declared)

    def read_now(traces: Sequence[Trace], wanted: Sequence[Wanted]) -> list[Taken]:
        extra = [{**(asked or {}), "steering_prompt": trace.generation_prompt_start} for trace in traces]
        return read(played, [trace.tokens for trace in traces], wanted, extra)

    names = ("name", "anatomy", "identity", "marks", "tokenizer", "change_ids")
    known = {name: getattr(model, name) for name in names} | {"longest": 256, "backend": {}}
    capture = SimpleNamespace(capture=tuple(declared))
    return SimpleNamespace(**known | {"declared": capture, "read": read_now, "llm": played} | told)


def reader(
    model: SteerableModel, recorders: Sequence[Any], asked: Mapping[str, Any] | None = None, **told: Any
) -> VllmReader:
    return VllmReader(view_of(model, places(recorders, model), asked, **told))


def alike(found: Summary, wanted: Summary) -> None:
    assert found.meta == wanted.meta
    assert found.rows == wanted.rows
    assert found.quantities == wanted.quantities
    for name in wanted.quantities:
        mine, theirs = found.values(name), wanted.values(name)
        if name.startswith("router.count"):
            assert torch.equal(mine, theirs), name
        assert float((mine - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize(("keep", "items"), [("trace", 8), ("group", 4)])
def test_summaries_are_those_of_hooks(tmp_path: Path, keep: Any, items: int) -> None:
    run, model = made.traces(items, longest=9), made.model("qwen3_moe", num_hidden_layers=2)
    recorders = [MEANS, COUNTS]
    options: dict[str, Any] = {"recorders": recorders, "keep": keep, "batch_tokens": 90}
    wanted = collect(model, run, tmp_path / "hooks", **options)
    found = collect(reader(model, recorders), run, tmp_path / "vllm", **options)
    alike(found, wanted)
    again = collect(reader(model, recorders), run, tmp_path / "vllm", **options, resume=True)
    alike(again, wanted)


def test_layers_and_dtype_as_with_hooks() -> None:
    run, model = made.traces(4), made.model()
    options: dict[str, Any] = {"sites": ("resid_post",), "spans": ("thinking",), "layers": [1, 3], "dtype": "bfloat16"}
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))])
    alike(collect(one, run, **options), collect(model, run, **options))


def test_a_killed_collection_goes_on(tmp_path: Path) -> None:
    run, model = made.traces(33, longest=5), made.model()
    recorders = [SpanMeans(("resid_post",), ("thinking",))]

    def stop(state: Any) -> None:
        if state.shards == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(reader(model, recorders), run, tmp_path / "part", recorders=recorders, progress=stop)
    again = reader(model, recorders)
    found = collect(again, run, tmp_path / "part", recorders=recorders, resume=True)
    assert len(again.model.llm.asked) == 2, "the second shard's"
    alike(found, collect(model, run, recorders=recorders))


def test_experts_are_scored_from_what_vllm_counted() -> None:
    run, model = made.traces(6), made.model("qwen3_moe")
    markers = {"<think>": 1.0, "</think>": -1.0}
    recorders = [RouterCounts(("all", *(f"marker:{text}@all" for text in markers)))]
    one = collect(reader(model, recorders), run, recorders=recorders)
    other = collect(model, run, recorders=recorders)
    mine, theirs = (expert_scores(summary, markers, resamples=0, null=False) for summary in (one, other))
    torch.testing.assert_close(mine.values, theirs.values)


def test_what_was_left_by_a_failed_call_is_forgotten() -> None:
    run, model = made.traces(4), made.model()
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))])
    one.model.llm.fails = True
    with pytest.raises(ValueError, match="refuses"):
        collect(one, run, sites=("resid_post",), spans=("thinking",))
    assert all(not stage._sums for stage in one.model.llm.stages)


def test_a_trace_that_the_engine_gave_up_is_an_error() -> None:
    one = reader(made.model(), [SpanMeans(("resid_post",), ("thinking",))])
    one.model.llm.ends = "error"
    with pytest.raises(SteerError, match="vLLM ended a trace that is read with 'error'"):
        collect(one, made.traces(2), sites=("resid_post",), spans=("thinking",))
    assert all(not stage._sums for stage in one.model.llm.stages)


def test_the_request_says_where_the_prompt_of_the_trace_ends() -> None:
    """Phases of a steering are told from it, and not from the prompt that vLLM is given."""
    run, model = made.traces(2), made.model()
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))], {"steering": "longer"})
    collect(one, run, sites=("resid_post",), spans=("thinking",))
    by_length = {(extra[KEY]["length"], extra[KEY]["prompt_length"]): extra for extra in one.model.llm.asked}
    for trace in run:
        extra = by_length[len(trace.tokens), trace.prompt_length]
        assert (extra["steering"], extra["steering_prompt"]) == ("longer", trace.generation_prompt_start)


def test_a_trace_as_long_as_the_engine_reads_is_left_out() -> None:
    """One token is written behind each; the plan counts those for which there is no room."""
    run, model = made.traces(6), made.model()
    longest = max(len(trace.tokens) for trace in run)
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))], longest=longest)
    found = collect(one, run, sites=("resid_post",), spans=("thinking",))
    assert sum(found.meta["traces"]["dropped"].values()) == sum(len(trace.tokens) == longest for trace in run)


@pytest.mark.parametrize(
    ("recorder", "said"),
    [
        (SpanMeans(("attn_raw",), ("thinking",)), "cannot read attn_raw"),
        (SegmentMeans(("resid_post",), "thinking", 4), "cannot record segment_means"),
        (HeadMeans(("thinking",)), "cannot read z"),
        (RouterCounts(("all",)), "no experts"),
        (SpanMeans(("mlp_out",), ("thinking",)), "mlp_out of layers 0-3 is to be read"),
    ],
)
def test_what_vllm_does_not_give_is_refused_by_name(recorder: Any, said: str) -> None:
    model = made.model()
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))])
    with pytest.raises(SteerError, match=said):
        collect(one, made.traces(2), recorders=[recorder])


def test_the_cache_keeps_what_vllm_read_apart(tmp_path: Path) -> None:
    run, model = made.traces(3), made.model()
    model.identity = replace(model.identity, weights_id="w" * 8)
    recorders = [SpanMeans(("resid_post",), ("thinking",))]
    options: dict[str, Any] = {"recorders": recorders, "cache": tmp_path}
    collect(model, run, **options)
    one = reader(model, recorders, backend={"vllm": "0.32.0"})
    collect(one, run, **options)
    assert len(one.model.llm.asked) == len(run), "what hooks read is not taken for it"
    collect(one, run, **options)
    assert len(one.model.llm.asked) == len(run), "its own is"
    other = reader(model, recorders, backend={"vllm": "0.33.0"})
    collect(other, run, **options)
    assert len(other.model.llm.asked) == len(run)


def test_weights_that_nobody_knows_are_not_cached(tmp_path: Path) -> None:
    model = made.model()
    assert model.identity.weights_id == UNKNOWN
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))])
    assert one.key() is None


def test_buffers_are_counted() -> None:
    model = made.model("qwen3_moe")
    declared = places([MEANS, COUNTS], model)
    played = Played(model, declared)
    numbers = model.anatomy
    counted = buffer_bytes(declared, 8, numbers.hidden, numbers.chosen, 4)
    assert counted == sum(stage.memory for stage in played.stages)


def test_a_run_of_traces_is_read_from_disk(tmp_path: Path) -> None:
    run, model = made.traces(3), made.model()
    Traces(run, run.meta).save(tmp_path / "run")
    one = reader(model, [SpanMeans(("resid_post",), ("thinking",))])
    found = collect(one, tmp_path / "run", sites=("resid_post",), spans=("thinking",))
    assert len(found) == len(run)
    assert steer.identity.tokenizer_id(model.tokenizer) == model.identity.tokenizer_id


def test_a_collection_goes_on_only_with_the_engine_that_began_it(tmp_path: Path) -> None:
    run, model = made.traces(3), made.model()
    recorders = [SpanMeans(("resid_post",), ("thinking",))]
    one = reader(model, recorders, backend={"name": "vllm", "version": "0.32.0"})
    found = collect(one, run, tmp_path / "out", recorders=recorders)
    shard = artifacts.read_block(next((tmp_path / "out").glob("shard-*")))
    assert shard["options"] == one.engine, "a shard says what read it"
    assert collect(one, run, tmp_path / "out", recorders=recorders, resume=True).rows == found.rows
    with pytest.raises(SteerError, match="other options"):
        collect(model, run, tmp_path / "out", recorders=recorders, resume=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What engines were started with; each is played by hooks."""
    found: list[tuple[str, dict[str, Any]]] = []

    @contextmanager
    def start(subject: str, **options: Any) -> Iterator[Any]:
        found.append((subject, options))
        model = open_subject(subject.removeprefix("vllm:"))
        yield view_of(model, options["capture"], dtype=torch.float32, backend={"name": "vllm", "version": "played"})

    monkeypatch.setattr("steer.subjects.open_engine", start)
    return found


@pytest.mark.parametrize("words", [("vllm:{}",), ("{}", "--backend", "vllm")])
def test_the_verb(
    started: list[Any], words: Sequence[str], tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tiny_folder("qwen3"), made.traces(6).save(tmp_path / "run")
    given = [word.format(folder) for word in words]
    options = ["--sites", "resid_mid,attn_out", "--spans", "thinking", "--layers", "1-2", "--batch-tokens", "32"]
    assert app.run(["collect", *given, "--traces", str(run), "--out", str(tmp_path / "served"), *options]) == 0
    said = capsys.readouterr().err
    assert "vLLM reads at 4 places" in said
    assert f"{4 * 32 * 48 * 4 / 1e6:.1f} MB on the device" in said
    ((subject, told),) = started
    assert subject == f"vllm:{folder}"
    assert told["max_num_batched_tokens"] == told["max_num_seqs"] == 32
    assert set(told["capture"]) == {(site, layer) for site in ("resid_mid", "attn_out") for layer in (1, 2)}
    assert app.run(["collect", str(folder), "--traces", str(run), "--out", str(tmp_path / "hooks"), *options]) == 0
    alike(Summary.load(tmp_path / "served"), Summary.load(tmp_path / "hooks"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vllm:{}"], "vLLM cannot read z.*--sites resid_mid"),
        (["vllm:{}", "--backend", "hf"], "hf without vllm:"),
        (["{}", "--backend", "sglang"], "hf or vllm"),
        (["vllm:{}", "--recorder", "segment_means:every=4"], "cannot record segment_means.*HF back end"),
    ],
)
def test_the_verb_refuses(
    started: list[Any],
    words: list[str],
    said: str,
    tiny_folder: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = made.traces(2).save(tmp_path / "run")
    given = [word.format(tiny_folder("qwen3")) for word in words]
    assert app.run(["collect", *given, "--traces", str(run), "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not started
    assert not (tmp_path / "out").exists()


def test_torchrun_is_refused(
    started: list[Any],
    tiny_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = made.traces(2).save(tmp_path / "run")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    out = str(tmp_path / "out")
    assert (
        app.run(["collect", f"vllm:{tiny_folder('qwen3')}", "--traces", str(run), "--out", out, "--sites", "resid_mid"])
        == 2
    )
    assert "without torchrun" in " ".join(capsys.readouterr().err.split())
    assert not started
