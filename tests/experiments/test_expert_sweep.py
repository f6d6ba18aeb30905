"""The sweep over experts on random models, where every figure can be told by asking the models by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import steer
from experiments import expert_sweep as module
from experiments.again import Again, answered
from experiments.expert_sweep import expert_sweep
from experiments.expert_sweep_asking import matched_draws, usual_policies
from experiments.expert_sweep_result import FIGURES, ExpertSweep
from experiments.tasks.task import Graded, Item
from experiments.think_policies import MinimumThinking, SwitchPenalty, ThinkingBudget, parse_policy
from probes.choose import parts
from probes.collect.plan import traces_hash
from steer.expert_interventions import ScaleExperts
from steer.expert_scores import ExpertScores
from steer.model import SteerableModel
from steer.sampling import Sampling
from steer.scored_markers import ScoredMarker
from steer.steering import Steering
from steer.trace import Trace
from steer.traces import Traces
from tests.probes.test_plots import drawn
from tests.steer.made import refused
from tests.tiny import build

SAMPLING = Sampling(1.5, max_new_tokens=24)
SMALL: dict[str, Any] = {"betas": (4.0, 64.0), "counts": (1, 2), "controls": 1, "seeds": 3, "resamples": 50}


@dataclass(frozen=True)
class Words:
    """A task without sense: a reply is right where it holds a word."""

    word: str = "wait"

    @property
    def name(self) -> str:
        return "words"

    def options(self) -> dict[str, Any]:
        return {"word": self.word}

    def items(self, limit: int | None = None) -> list[Item]:
        return [Item(f"w{n:02d}", " ".join("abcdefghij"[n % 7 :: 1 + n % 3]), self.word) for n in range(limit or 16)]

    def grade(self, text: str, gold: str, start: int | None) -> Graded:
        return Graded(gold if gold in text else None, gold in text)


@pytest.fixture(scope="module")
def model() -> SteerableModel:
    hf, tokenizer = build("qwen3_moe", dtype=torch.float32)
    with torch.no_grad():
        hf.lm_head.weight[[5, 6]] *= 3.0
    return steer.wrap(hf, tokenizer)


def scores(data_hash: str | None = None) -> ExpertScores:
    values = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.8, 0.0, 0.4, 0.5]])
    chosen = torch.tensor([[40, 10, 45, 25], [30, 50, 20, 20]])
    together = torch.tensor([[[1, 3, 1, 1], [2, 1, 2, 1]]])
    return ExpertScores(
        values, (1, 3), chosen, together, 60, (ScoredMarker("<think>", 1.0, 3),), "npmi",
        provenance={} if data_hash is None else {"data_hash": data_hash},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(model: SteerableModel) -> Traces:
    return answered(model, Words(), samples=2, seed=1, sampling=SAMPLING)


@pytest.fixture(scope="module")
def sweep(model: SteerableModel, run: Traces) -> ExpertSweep:
    """With the aim of longer thoughts, which some scaling of a random model always gives."""
    policies = [parse_policy(text, model.marks, model.tokenizer) for text in ("min:4", "min:12")]
    return expert_sweep(model, scores(), run, task=Words(), aim="longer", floor=0.0, prompts=("why", "let me think"), policies=policies, switches=("so",), **SMALL)  # fmt: skip


def means(model: SteerableModel, traces: Iterable[Trace]) -> dict[str, float]:
    """The figures, told without the code of the sweep."""
    traces = list(traces)
    thoughts = [trace for trace in traces if trace.thinking_span is not None]
    written, repeated = [], []
    for trace in thoughts:
        assert trace.thinking_span is not None
        tokens = trace.tokens[max(trace.thinking_span[0], trace.prompt_length) : trace.thinking_span[1]]
        written.append(1 + model.tokenizer.decode(tokens).split().count("so"))
        grams = [tokens[n : n + 4] for n in range(len(tokens) - 3)]
        if grams:
            repeated.append(1 - len(set(grams)) / len(grams))
    return {
        "accuracy": np.mean(["wait" in trace.text for trace in traces]),
        "length": np.mean([trace.thinking_tokens or len(trace.completion_token_ids) for trace in traces]),
        "closed": np.mean([bool(trace.closed) for trace in thoughts]),
        "thoughts": np.mean(written),
        "repetition": np.mean(repeated),
    }  # fmt: skip


def asked_by_hand(model: SteerableModel, run: Traces, experts: Any, beta: float, items: frozenset[str], samples: int) -> list[Trace]:  # fmt: skip
    """Replies under a scaling, with nothing but `generate`."""
    from steer.generation import Prompt, generate

    prompts = {trace.item: Prompt(trace.item, trace.prompt, trace.group, trace.gold) for trace in run}
    chosen = [prompts[item] for item in sorted(items)]
    view = model.with_(Steering((ScaleExperts(experts, beta),), model.identity)) if experts else model
    return list(generate(view, chosen, sampling=SAMPLING, samples=samples, seed=1))


def test_every_figure_is_that_of_models_asked_by_hand(model: SteerableModel, run: Traces, sweep: ExpertSweep) -> None:
    cut = parts([trace.item for trace in run], seed=0)
    assert sweep.questions == tuple(map(len, cut))
    plain = means(model, asked_by_hand(model, run, (), 1.0, cut[2], 3))
    for items, samples, rows in ((cut[1], 2, [*sweep.tried, *sweep.band]), (cut[2], 3, sweep.report)):
        for row in rows:
            if row.name in ("prompt", "decoding"):
                continue
            expected = means(model, asked_by_hand(model, run, row.experts, row.beta, items, samples))
            for name in FIGURES:
                assert row.means[name].value == pytest.approx(expected[name]), (row.name, name)
            if rows is sweep.report:
                assert row.changes["length"].value == pytest.approx(expected["length"] - plain["length"])
                assert np.mean(row.by_seed) == pytest.approx(expected["accuracy"]) and len(row.by_seed) == 3


def test_the_grid_and_the_choice(sweep: ExpertSweep) -> None:
    top = ((1, 1), (3, 0))
    expected = [((), 1.0)] + [(top[:count], beta) for count in (1, 2) for beta in (4.0, 64.0)]
    assert [(row.experts, row.beta) for row in sweep.tried] == expected
    lengths = [row.means["length"].value or 0.0 for row in sweep.tried]
    assert sweep.best.means["length"].value == max(lengths) > lengths[0]
    assert sweep.steering is not None
    (scaling,) = sweep.steering.interventions
    assert scaling == ScaleExperts(sweep.best.experts, sweep.best.beta)


def test_controls_share_nothing_with_the_chosen_and_baselines_are_chosen_too(sweep: ExpertSweep) -> None:
    names = [row.name for row in sweep.report]
    assert names == ["unsteered", "chosen", "random 1", "matched 1", "prompt", "decoding"]
    chosen = set(sweep.best.experts)
    for row in (*sweep.band, *sweep.report[2:4]):
        assert len(row.experts) == len(chosen) and not chosen & set(row.experts)
    assert all(row.beta == sweep.best.beta for row in sweep.report[1:4])
    assert [row.beta for row in sweep.band] == [4.0, 64.0]
    for kind, texts in (("prompt", ["'why'", "'let me think'"]), ("decoding", ["min:4", "min:12"])):
        tried = {row.told: row.means["length"].value or 0.0 for row in sweep.baselines if row.name == kind}
        assert list(tried) == texts
        told = next(row.told for row in sweep.report if row.name == kind)
        assert tried[told] == max(tried.values())
    assert sweep.beyond is not None
    values = {row.name: row.means["length"].value or 0.0 for row in sweep.report}
    others = (values["random 1"] + values["matched 1"]) / 2
    assert sweep.beyond["length"].value == pytest.approx(values["chosen"] - others)
    assert sweep.against["prompt"]["length"].value == pytest.approx(values["chosen"] - values["prompt"])


def test_it_asks_nothing_of_the_report_before_the_choice(model: SteerableModel, run: Traces, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nor of the fit questions at all: what is asked of a model is either the second part or the third."""
    seen: list[tuple[frozenset[str], int | None]] = []
    real = Again.ask

    def watched(self: Again, model: SteerableModel, items: Iterable[str], **options: Any) -> list[Trace]:
        seen.append((frozenset(items), options["samples"]))
        return real(self, model, seen[-1][0], **options)

    monkeypatch.setattr(Again, "ask", watched)
    found: list[Traces] = []

    def made(traces: Traces) -> ExpertScores:
        found.append(traces)
        return scores()

    told: list[int] = []
    expert_sweep(model, made, run, task=Words(), aim="longer", floor=0.0, policies=(), seed=5, tell=told.append, **SMALL)  # fmt: skip
    fit, choosing, reporting = parts([trace.item for trace in run], seed=5)
    assert {trace.item for trace in found[0]} == fit
    places = [place for place, (items, _) in enumerate(seen) if items == reporting]
    assert all(items == choosing for items, _ in seen[: places[0]]) and places == list(range(places[0], len(seen)))
    assert {samples for items, samples in seen} == {None, 3}
    assert len(told) == len(seen) and told[-1] == 3 * len(reporting)


def test_where_nothing_differs_nothing_is_chosen(model: SteerableModel, run: Traces) -> None:
    """No reply is right, so no point comes before the unsteered model, and the report says so."""
    never = Traces([replace(trace, correct=False, gold="never") for trace in run], run.meta)
    sweep = expert_sweep(model, scores(), never, task=Words("never"), policies=(), **SMALL)
    assert sweep.chosen == 0 and sweep.steering is None and sweep.beyond is None and not sweep.against
    assert [row.name for row in sweep.report] == ["unsteered"]
    told = " ".join(sweep.sentences())
    assert "none is to be used" in told and "No prompt stands beside" in told and "No decoding constraint" in told
    assert "not known" in told
    assert sweep.to_dict()["chosen"] is None
    drawn(sweep.plot())


def test_a_scaling_that_breaks_the_model_is_left_out_and_told() -> None:
    """1e30 times a weight is more than float16 holds."""
    half = steer.wrap(*build("qwen3_moe", dtype=torch.float16))
    options: dict[str, Any] = {**SMALL, "betas": (2.0, 1e30), "counts": (1,), "policies": (), "task": Words()}
    run = answered(half, Words(), samples=2, seed=1, sampling=SAMPLING)
    sweep = expert_sweep(half, scores(), run, aim="longer", floor=0.0, **options)
    assert [row.beta for row in (*sweep.tried, *sweep.band)] == [1.0, 2.0, 2.0]
    told = [remark for remark in sweep.remarks if "breaks the model" in remark]
    assert len(told) == 2 and "1 expert × 1e+30: (1, 1)" in told[0]


def test_it_is_decided_by_the_seed(model: SteerableModel, run: Traces) -> None:
    options: dict[str, Any] = {**SMALL, "counts": (1,), "task": Words(), "policies": (), "aim": "longer"}
    one, again, other = (
        json.dumps(expert_sweep(model, scores(), run, seed=seed, **options).to_dict()) for seed in (3, 3, 4)
    )
    assert one == again != other


def test_shapes_for_people(sweep: ExpertSweep) -> None:
    drawn(sweep.plot())
    frame = sweep.frame()
    assert list(frame.part.unique()) == ["choice", "report"] and frame.chosen.sum() == 1
    assert len(frame) == 5 + 2 + 4 + 6
    assert "<table>" in sweep._repr_html_() and "matched 1" in sweep._repr_html_()
    told = sweep.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["sentences"] == list(sweep.sentences()) and len(told["report"]) == 6


@pytest.mark.parametrize(
    ("aim", "low", "high", "word"),
    [
        ("longer", 1.0, 3.0, "do more than other experts"),
        ("longer", -1.0, 3.0, "do nothing beyond other experts"),
        ("longer", -3.0, -1.0, "do worse than other experts"),
        ("shorter", -3.0, -1.0, "do more than other experts"),
    ],
)
def test_the_verdict_is_that_of_the_interval(sweep: ExpertSweep, aim: str, low: float, high: float, word: str) -> None:
    assert sweep.beyond is not None
    beyond = {**sweep.beyond, "length": steer.intervals.Interval((low + high) / 2, low, high)}
    verdict = replace(sweep, aim=aim, beyond=beyond).verdict
    assert word in verdict and "1 random and 1 matched" in verdict and "length" in verdict
    assert "nobody can say" in replace(sweep, beyond=None).verdict


def test_controls_that_do_harm_are_told(sweep: ExpertSweep) -> None:
    """A difference from models that are broken is no gain."""
    for low, high, expected in ((-0.8, -0.6, True), (-0.8, 0.1, False)):
        change = steer.intervals.Interval(-0.7, low, high)
        report = [replace(row, changes={**row.changes, "accuracy": change}) if row.name[:6] in ("random", "matche") else row for row in sweep.report]  # fmt: skip
        told = " ".join(replace(sweep, report=tuple(report)).sentences())
        assert ("their harm" in told and "-0.700 on average" in told) == expected


def test_policies_for_an_aim(model: SteerableModel, run: Traces) -> None:
    traces = list(run)
    lengths = [trace.thinking_tokens for trace in traces if trace.thinking_tokens is not None]
    shorter, longer = (usual_policies(model, traces, aim) for aim in ("shorter", "longer"))
    assert all(isinstance(policy, ThinkingBudget) for policy in shorter)
    assert [policy.name for policy in longer] == [f"min:{int(np.quantile(lengths, at))}" for at in (0.5, 0.9)]
    assert all(isinstance(policy, MinimumThinking) and policy.ends == (2,) for policy in longer)
    switching = steer.wrap(model.hf, _with_word(model.tokenizer))
    (tip,) = usual_policies(switching, traces, "accuracy")
    assert isinstance(tip, SwitchPenalty) and tip.name == "tip:3:600"
    assert usual_policies(model, [], "longer") == ()


def _with_word(tokenizer: Any) -> Any:
    class Known:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def get_vocab(self) -> dict[str, int]:
            return {**tokenizer.get_vocab(), "Alternatively": 30}

    return Known()


def test_matched_sets_share_none_and_run_out() -> None:
    draws, short = matched_draws(scores(), ((1, 1), (3, 0)), 3, seed=0)
    assert len(draws) == 3 and not short
    assert {expert for draw in draws for expert in draw} == {(1, 0), (1, 2), (1, 3), (3, 1), (3, 2), (3, 3)}
    draws, short = matched_draws(scores(), ((1, 1), (1, 3)), 3, seed=0)
    assert draws == [((1, 0), (1, 2))] or set(draws[0]) == {(1, 0), (1, 2)}
    assert short == ["1 frequency-matched sets instead of 3: the layers have no more others."]


def test_what_is_refused(model: SteerableModel, run: Traces) -> None:
    def attempt(given: Any = None, **options: Any) -> Callable[[], object]:
        return lambda: expert_sweep(model, given or scores(), run, **{**SMALL, "task": Words(), **options})

    refused(attempt(aim="better"), "aim", "shorter")
    refused(attempt(betas=(1.0,)), "at least one beta")
    refused(attempt(betas=(-2.0,)), "beta is -2")
    refused(attempt(counts=()), "numbers of experts")
    refused(attempt(counts=(0, 1)), "1 or more")
    refused(attempt(counts=(5,)), "8 are scored", "at most 4", "fewer")
    refused(attempt(seeds=0), "0 seeds")
    refused(attempt(controls=-1), "-1 controls")
    refused(attempt(phase="sometimes"), "no phase")
    refused(attempt(scores(traces_hash(run))), "all questions of the run", "--choose")
    refused(lambda: expert_sweep(model, scores(), Traces([], run.meta)), "no traces")
    fit = parts([trace.item for trace in run], seed=0)[0]
    own = scores(traces_hash(run.where(lambda trace: trace.item in fit)))
    assert module._scores(model, own, run, fit) == (own, [])
