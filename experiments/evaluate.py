"""Evaluate a model on a task: a run folder that a kill cannot spoil (DESIGN §3, §5).

Items are cut into shards; a finished shard is graded and journalled whole. What is left after a kill and `resume` has
the bytes of a run that nobody interrupted: shards depend on the options alone, and timings stay in the journal.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.run import ITEMS, SUMMARY, Run, items_text
from experiments.summary import Replies, summarise
from experiments.tasks.registry import named
from experiments.tasks.task import Item, Task
from steer.errors import SteerError
from steer.files import write_text
from steer.generation import BATCH, Progress, Prompt, Sampling, run_meta
from steer.identity import UNKNOWN, canonical
from steer.model import SteerableModel
from steer.patches import Patch
from steer.policy import Policy, check_policy
from steer.shards import Journal, Shard, cut
from steer.steering import Steering
from steer.trace import Trace, decode, token_span, trace_line
from steer.tracefile import parse_line
from steer.traces import LINES, RUN, Traces, run_text

if TYPE_CHECKING:
    from steer.backends.vllm.adapters import Adapter
    from steer.backends.vllm.llm import SteeredLLM

JOURNAL = "journal"
Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class _Job:
    """One evaluation, everything resolved."""

    model: SteerableModel | SteeredLLM
    task: Task
    items: dict[str, Item]
    sampling: Sampling
    samples: int
    seed: int
    policy: Policy | None
    thinking: bool | None
    batch_size: int

    def prompts(self, shard: Shard) -> list[Prompt]:
        """The prompts of a shard."""
        chat = self.model.tokenizer.chat_template is not None
        found = [self.items[name] for name in shard.ids]
        return [Prompt(item.id, item.content(chat), item.group, item.gold) for item in found]

    def meta(self) -> dict[str, Any]:
        """The content of `run.yaml`."""
        generation = run_meta(
            self.model,
            sampling=self.sampling,
            samples=self.samples,
            policy=self.policy,
            seed=self.seed,
            batch_size=self.batch_size,
            thinking=self.thinking,
        )
        return generation | {
            "task": {"name": self.task.name, **self.task.options()},
            "items": len(self.items),
            "changes": changes_of(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("reasoning-steer", "torch", "transformers")},
        }


def evaluate(
    model: SteerableModel | SteeredLLM,
    task: Task | str,
    *,
    out: str | Path,
    sampling: Sampling | None = None,
    samples: int = 1,
    seed: int = 0,
    policy: Policy | None = None,
    thinking: bool | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    resume: bool = False,
    progress: Tell | None = None,
) -> Run:
    """Ask a task's questions, grade the replies, and write a run folder.

    Args:
        model: a model, an engine (`SteeredLLM`), or a view of either; the changes in force, of the view and of open contexts, stand in `run.yaml`.
        task: such as "chain" or "gsm8k:test.jsonl" (see `experiments.tasks.named`), or a task of your own.
        out: the run folder.
        sampling: None takes what the model asks for.
        samples: replies per question.
        seed: of the sampling; the questions do not depend on it.
        policy: a think policy.
        thinking: sets the chat template's own switch.
        limit: the first so many questions.
        batch_size: rows decoded together; None: 64, of an engine the number for which it was started.
        resume: go on with what `out` holds; a finished run of the same options is returned as it is.
        progress: called after every step, over all shards.

    Raises:
        SteerError: `out` exists (without `resume`), or holds a run with other options; bad options or questions.
        OSError: the disk or the permissions refuse; finished shards stay, to be resumed.
    """
    job = _prepared(model, task, sampling, samples, seed, policy, thinking, limit, batch_size)
    folder, meta = Path(out), job.meta()
    refuse_folder(folder, resume)
    if folder.exists() and any(change["fingerprint"] == UNKNOWN for change in meta["changes"]):
        raise SteerError(
            "a Custom function has no fingerprint, so nobody can say whether it is the one the run was begun with",
            "changes with a fingerprint",
            "Evaluate again into another folder",
        )
    with _begun(folder, meta) as journal:
        if (folder / SUMMARY).is_file():
            return Run.load(folder)
        return _finished(job, folder, _shards(job, journal, progress))


def refuse_folder(folder: Path, resume: bool) -> None:
    """Refuse to write into what is there, unless it is an evaluation that may go on.

    Raises:
        SteerError: `folder` exists, and is not one that was begun or is not to be resumed.
    """
    if folder.exists() and not resume:
        raise SteerError(
            f"{folder} exists already",
            "a folder that does not exist yet",
            "Choose another name, remove it, or pass --resume to go on with an interrupted evaluation",
        )
    if folder.exists() and not (folder / JOURNAL / "key.json").is_file():
        raise SteerError(
            f"{folder} is no evaluation that was begun", "a run folder with a journal", "Leave out --resume"
        )


def _prepared(
    model: SteerableModel | SteeredLLM,
    task: Task | str,
    sampling: Sampling | None,
    samples: int,
    seed: int,
    policy: Policy | None,
    thinking: bool | None,
    limit: int | None,
    batch_size: int | None,
) -> _Job:
    """Check everything that can be checked before a folder is made."""
    if model.tokenizer is None:
        raise SteerError(f"{model.name} has no tokenizer", "one, to ask questions in words")
    if batch_size is None:
        batch_size = BATCH if isinstance(model, SteerableModel) else model.batch_size
    if samples < 1 or batch_size < 1 or (limit is not None and limit < 1):
        raise SteerError(f"samples is {samples}, limit {limit} and batch_size {batch_size}", "1 or more of each")
    check_policy(policy, model.marks)
    chosen = named(task) if isinstance(task, str) else task
    items = chosen.items(limit)
    if not items:
        raise SteerError(f"the task {chosen.name} has no questions", "at least one")
    chosen.grade("", items[0].gold, 0)
    options = Sampling.of(model) if sampling is None else sampling
    job = _Job(model, chosen, {item.id: item for item in items}, options, samples, seed, policy, thinking, batch_size)
    cut([item.id for item in items])
    model.render(items[0].content(model.tokenizer.chat_template is not None), thinking)
    return job


@contextmanager
def _begun(folder: Path, meta: dict[str, Any]) -> Iterator[Journal]:
    """Make the folder or go on with it; one in which nothing was finished does not outlive an error."""
    fresh, whole = not folder.exists(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder / JOURNAL, meta, ".jsonl")
        write_text(folder / RUN, run_text(meta), overwrite=True)
        yield journal
        whole = True
    finally:
        if fresh and not whole and not any((folder / JOURNAL).glob("*.jsonl")):
            shutil.rmtree(folder, ignore_errors=True)


def _shards(job: _Job, journal: Journal, progress: Tell | None) -> Iterator[bytes]:
    """The lines of every shard in order, generated where the journal does not have them."""
    total, done, tokens, began = len(job.items) * job.samples, 0, 0, time.monotonic()

    def tell(state: Progress) -> None:
        if progress is not None:
            progress(Progress(done + state.done, total, tokens + state.tokens, time.monotonic() - began))

    for shard in cut(job.items):
        if not journal.has(shard):
            start = time.monotonic()
            replies = job.model.generate_shard(
                job.prompts(shard),
                sampling=job.sampling,
                samples=job.samples,
                policy=job.policy,
                seed=job.seed,
                batch_size=job.batch_size,
                thinking=job.thinking,
                progress=tell,
            )
            sampled = time.monotonic() - start
            lines = [f"{trace_line(graded(trace, job.model, job.task))}\n" for trace in replies]
            new = sum(len(trace.completion_token_ids) for trace in replies)
            notes = {"sampling_seconds": sampled, "seconds": time.monotonic() - start, "tokens": new}
            journal.write(shard, "".join(lines).encode("utf-8"), notes)
            tokens += new
        done += len(shard.ids) * job.samples
        tell(Progress(0, 0, 0, 0.0))
        yield journal.read(shard)


def _finished(job: _Job, folder: Path, shards: Iterator[bytes]) -> Run:
    data = b"".join(shards)
    traces = Traces([parse_line(line) for line in data.decode("utf-8").split("\n") if line], job.meta())
    short = {item.id: item.short_below for item in job.items.values() if item.short_below is not None}
    summary = summarise(Replies.of(traces, job.model.marks, short), job.seed)
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    write_text(folder / ITEMS, items_text(list(job.items.values())), overwrite=True)
    write_text(folder / LINES, data.decode("utf-8"), overwrite=True)
    write_text(folder / SUMMARY, f"{text}\n", overwrite=True)
    return Run.load(folder)


def graded(trace: Trace, model: SteerableModel | SteeredLLM, task: Task) -> Trace:
    """The trace with the grader's answer, whether it is right, and the tokens where it stands.

    The text after the closing mark is graded; a thought that never closed has no final answer.
    """
    assert trace.gold is not None
    start: int | None = 0
    if trace.thinking_span is not None:
        spoken = trace.thinking_span[1] - trace.prompt_length
        start = len(decode(model.tokenizer, trace.completion_token_ids[: max(spoken, 0)])) if trace.closed else None
    found = task.grade(trace.text, trace.gold, start)
    span = None if found.span is None else token_span(trace, model.tokenizer, *found.span)
    return replace(trace, answer=found.answer, correct=found.correct, answer_span=span)


def changes_of(model: SteerableModel | SteeredLLM) -> list[dict[str, Any]]:
    """The changes in force, for `run.yaml`: kind, fingerprint ("unknown" for a `Custom` function) and coefficient."""

    def fingerprint(change: Steering | Patch | Adapter) -> str:
        return UNKNOWN if isinstance(change, Steering) and not change.has_fingerprint else change.fingerprint

    return [
        {"kind": type(change).__name__.lower(), "fingerprint": fingerprint(change), "coefficient": coefficient}
        for change, coefficient in model.in_force
    ]


def same_questions(runs: Sequence[Run]) -> None:
    """Refuse to compare runs that did not ask the same questions as often.

    Raises:
        SteerError: items or numbers of samples differ.
    """
    asked = {canonical([[trace.item, trace.sample] for trace in run.traces]) for run in runs}
    if len(asked) > 1:
        raise SteerError(
            f"the runs {', '.join(str(run.folder) for run in runs)} asked different questions",
            "the same items and samples in each",
            "Evaluate them with the same --task, --limit and --samples",
        )
