"""The run folder: what stands in it, what may resume it, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import steer
from experiments.evaluate import evaluate, same_questions
from experiments.organisms import chain
from experiments.run import Run
from experiments.tasks import named
from experiments.think_policies import parse_policy
from steer.directions import Direction
from steer.errors import SteerError
from steer.interventions import Add, Custom
from steer.sampling import Sampling
from steer.steering import Steering

QUICK = Sampling(0.8, max_new_tokens=40)
FILES = ("run.yaml", "items.jsonl", "traces.jsonl", "summary.json")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that has to be equal: results, and the journal without its timings."""
    parts = {path.name: path.read_bytes() for path in (folder / "journal").glob("*.jsonl")}
    return {name: (folder / name).read_bytes() for name in FILES} | parts


@pytest.fixture(scope="module")
def whole(organism, tmp_path_factory) -> Run:
    """An evaluation of two shards that nobody interrupted."""
    return evaluate(organism, "chain", out=tmp_path_factory.mktemp("runs") / "whole", sampling=QUICK, limit=70, seed=3)


def test_every_reply_is_graded_as_the_organism_grades(whole):
    golds = {question.id: question for question in chain.questions(70, chain.TEST)}
    assert [trace.item for trace in whole.traces] == sorted(golds)
    for trace in whole.traces:
        question = golds[trace.item]
        assert trace.answer == chain.answer_of(trace.text)
        assert trace.correct == (trace.answer == question.answer)
        assert trace.gold == question.answer and trace.group == str(question.size)
        assert whole.short_below[trace.item] == question.full_length
        if trace.answer is not None:
            start, end = trace.answer_span
            assert chain.decode(list(trace.tokens[start:end])) == trace.answer
        else:
            assert trace.answer_span is None
    assert 0.1 < whole.accuracy < 0.9 and any(not trace.closed for trace in whole.traces), "40 tokens cut some off"


def test_the_folder_says_what_was_run(whole, organism):
    meta = yaml.safe_load((whole.folder / "run.yaml").read_text())
    assert meta["model"] == organism.identity.to_dict()
    assert meta["tokenizer_id"] == organism.identity.tokenizer_id
    assert meta["task"] == {"name": "chain", "split": "test", "questions_seed": chain.TEST}
    assert meta["sampling"] == QUICK.to_dict() and meta["seed"] == 3 and meta["policy"] is None
    assert meta["changes"] == [] and meta["items"] == 70 and meta["marks"]["opening"] == [[3]]
    assert set(meta["versions"]) == {"reasoning-steer", "torch", "transformers"}
    assert whole.summary == json.loads((whole.folder / "summary.json").read_text())
    notes = [json.loads(path.read_text()) for path in (whole.folder / "journal").glob("*.notes.json")]
    assert len(notes) == 2 and all(note["seconds"] > 0 for note in notes)
    assert "seconds" not in (whole.folder / "summary.json").read_text()


def test_a_run_is_read_back(whole):
    again = Run.load(whole.folder)
    assert again.traces == whole.traces and again.summary == whole.summary and again.short_below == whole.short_below
    assert "accuracy" in str(again) and "<table>" in again._repr_html_()


def test_more_questions_leave_the_first_as_they_were(whole, organism, tmp_path):
    """A reply depends on (seed, item, sample): fewer questions give the same replies."""
    few = evaluate(organism, "chain", out=tmp_path / "few", sampling=QUICK, limit=5, seed=3)
    same = {trace.id: trace.text for trace in whole.traces}
    assert [trace.text for trace in few.traces] == [same[trace.id] for trace in few.traces]
    other = evaluate(organism, "chain", out=tmp_path / "other", sampling=QUICK, limit=5, seed=4)
    assert [t.text for t in other.traces] != [t.text for t in few.traces]


def test_an_interrupted_run_goes_on_to_the_same_bytes(whole, organism, tmp_path):
    out, shards = tmp_path / "run", []

    def stop(state):
        shards.append(state.done)
        if state.done >= 66:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(organism, "chain", out=out, sampling=QUICK, limit=70, seed=3, progress=stop)
    assert len(list((out / "journal").glob("*.jsonl"))) == 1 and not (out / "summary.json").exists()
    with pytest.raises(SteerError, match="exists already"):
        evaluate(organism, "chain", out=out, sampling=QUICK, limit=70, seed=3)
    with pytest.raises(SteerError, match="seed was 3, is 4"):
        evaluate(organism, "chain", out=out, sampling=QUICK, limit=70, seed=4, resume=True)
    with pytest.raises(SteerError, match="items was 70, is 71"):
        evaluate(organism, "chain", out=out, sampling=QUICK, limit=71, seed=3, resume=True)
    seen = []
    evaluate(organism, "chain", out=out, sampling=QUICK, limit=70, seed=3, resume=True, progress=seen.append)
    assert seen[0].done == 64, "the finished shard is not sampled again"
    assert contents(out) == contents(whole.folder)
    before = contents(out)
    evaluate(organism, "chain", out=out, sampling=QUICK, limit=70, seed=3, resume=True)
    assert contents(out) == before


def test_nothing_is_left_of_a_run_that_finished_nothing(organism, tmp_path):
    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(organism, "chain", out=tmp_path / "run", sampling=QUICK, limit=3, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "nonsense"}, "no task 'nonsense'"),
        ({"samples": 0}, "Samples is 0"),
        ({"limit": 0}, "limit 0"),
        ({"task": "jsonl:/nowhere.jsonl"}, "nowhere"),
    ],
)
def test_bad_options_make_no_folder(organism, tmp_path, options, message):
    with pytest.raises(SteerError, match=message):
        evaluate(organism, **({"task": "chain", "out": tmp_path / "run", "limit": 2} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_resumed(organism, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(SteerError, match=r"exists already|no evaluation"):
            evaluate(organism, "chain", out=tmp_path / "mine", limit=2, resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_samples_policies_and_changes_stand_in_the_run(organism, tmp_path):
    direction = Direction(organism.parameter("attention_output", 0).detach()[:1] * 0 + 1.0, (2,), "resid_mid")
    view = organism.with_(Steering((Add(direction, "attn_out"),), organism.identity, "push"), coefficient=0.5)
    policy = parse_policy("budget:12", organism.marks, organism.tokenizer)
    run = evaluate(
        view,
        "chain",
        out=tmp_path / "run",
        sampling=QUICK,
        limit=3,
        samples=2,
        policy=policy,
    )
    assert [trace.id[-2:] for trace in run.traces] == ["/0", "/1"] * 3
    change = run.traces.meta["changes"][0]
    assert change == {"kind": "steering", "fingerprint": view.changes[0][0].fingerprint, "coefficient": 0.5}
    assert run.traces.meta["policy"] == policy.name
    assert run.summary["avg_at_k"]["k"] == 2
    assert max(trace.thinking_tokens for trace in run.traces) <= 14


def test_open_contexts_stand_in_the_run_and_unknown_functions_are_not_resumed(organism, tmp_path):
    direction = Direction(organism.parameter("attention_output", 0).detach()[:1] * 0 + 1.0, (2,), "resid_mid")
    steering = Steering((Add(direction, "attn_out"),), organism.identity, "push")
    with organism.steered(steering, 0.25):
        run = evaluate(organism, "chain", out=tmp_path / "steered", sampling=QUICK, limit=2)
    assert run.traces.meta["changes"] == [
        {"kind": "steering", "fingerprint": steering.fingerprint, "coefficient": 0.25}
    ]
    view = organism.with_(Steering((Custom(lambda h, layer: h * 0, "resid_post", (1,)),), organism.identity))
    run = evaluate(view, "chain", out=tmp_path / "custom", sampling=QUICK, limit=2)
    assert run.traces.meta["changes"][0]["fingerprint"] == "unknown"
    with pytest.raises(SteerError, match="no fingerprint"):
        evaluate(view, "chain", out=tmp_path / "custom", sampling=QUICK, limit=2, resume=True)


def test_without_a_chat_template_the_question_is_raw_text(tiny, tmp_path):
    model = steer.wrap(*tiny("llama"))
    model.tokenizer.chat_template = None
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "one and one", "answer": "2"}\n')
    run = evaluate(model, f"jsonl:{file}", out=tmp_path / "run", sampling=Sampling(1.0, max_new_tokens=6))
    assert run.traces[0].prompt == "one and one" and run.traces[0].prompt_length > 0


def test_a_model_without_a_tokenizer_is_refused(tiny, tmp_path):
    with pytest.raises(SteerError, match="no tokenizer"):
        evaluate(steer.wrap(tiny("llama")[0], None, name="bare"), "chain", out=tmp_path / "run")


def test_runs_of_other_questions_are_not_compared(whole, organism, tmp_path):
    few = evaluate(organism, "chain", out=tmp_path / "few", sampling=QUICK, limit=4)
    same_questions([whole, whole])
    with pytest.raises(SteerError, match="different questions"):
        same_questions([whole, few])


def test_a_number_is_graded_where_it_stands(organism, tmp_path):
    """The span of a number in a reply covers the tokens that write it, whatever the tokenizer."""
    from experiments.evaluate import graded
    from steer.trace import make_trace

    ids = chain.encode("<think> b = 7 ; </think> b = 4 <|im_end|>")
    trace = make_trace(
        item="a", sample=0, prompt="?", prompt_token_ids=chain.encode("? b"), completion_token_ids=ids,
        tokenizer=organism.tokenizer, marks=organism.marks, finish_reason="stop", gold="b = 4",
    )  # fmt: skip
    found = graded(trace, organism, named("chain"))
    assert found.correct and found.tokens[slice(*found.answer_span)] == tuple(chain.encode("b = 4"))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import steer
from experiments.evaluate import evaluate
from steer.sampling import Sampling
evaluate(steer.load("organism:chain", self_check=False), "chain", out=sys.argv[1],
         sampling=Sampling(0.8, max_new_tokens=40), limit=140, seed=3, resume=len(sys.argv) > 2)
"""


@pytest.mark.faults
def test_a_killed_run_goes_on_to_the_same_bytes(organism, tmp_path):
    whole = evaluate(organism, "chain", out=tmp_path / "whole", sampling=QUICK, limit=140, seed=3)
    out = tmp_path / "killed"
    options = {"cwd": Path(__file__).parents[2], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    kills = 0
    for finished in (1, 2):
        arguments = [sys.executable, "-c", SCRIPT, str(out), *(["resume"] if kills else [])]
        process = subprocess.Popen(arguments, **options, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("journal/*.jsonl"))) < finished:
            time.sleep(0.01)
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills, "both runs ended before they could be killed"
    evaluate(organism, "chain", out=out, sampling=QUICK, limit=140, seed=3, resume=True)
    assert contents(out) == contents(whole.folder)
    assert not [path for path in out.rglob("*partial*") if path.stat().st_size and path.suffix == ".jsonl"]


@pytest.mark.faults
def test_a_disk_that_refuses_leaves_nothing_or_what_can_be_resumed(organism, tmp_path):
    """Files may not grow beyond a limit: first not even a shard fits, then the shards fit and their sum does not."""
    words = ["evaluate", "organism:chain", "--task", "chain", "--limit", "128", "--max-new-tokens", "40", "--seed", "3"]
    program = (
        "import resource, sys; limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
    )
    program += "import torch; torch.set_num_threads(1); from steer.cli import app; sys.exit(app.run(sys.argv[2:]))"

    def attempt(limit: int, name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-B", "-c", program, str(limit), *words, "--out", str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
        )

    whole = evaluate(organism, "chain", out=tmp_path / "whole", sampling=QUICK, limit=128, seed=3)
    shards = [path.stat().st_size for path in (whole.folder / "journal").glob("*.jsonl")]
    done = attempt(min(shards) // 2, "none")
    assert done.returncode == 2 and "too large" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()
    done = attempt((max(shards) + sum(shards)) // 2, "part")
    assert done.returncode == 2 and "too large" in done.stderr
    assert len(list((tmp_path / "part" / "journal").glob("*.jsonl"))) == 2
    assert not (tmp_path / "part" / "traces.jsonl").exists() and not (tmp_path / "part" / "summary.json").exists()
    evaluate(organism, "chain", out=tmp_path / "part", sampling=QUICK, limit=128, seed=3, resume=True)
    assert contents(tmp_path / "part") == contents(whole.folder)
