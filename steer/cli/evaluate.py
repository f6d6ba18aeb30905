"""`steer evaluate`: answer a task; accuracy, lengths and closure, with intervals, in a run folder."""

from __future__ import annotations

from typing import Annotated

import typer

from steer.cli.engine import Engine
from steer.cli.generate import MaxNewTokens, NoThinking, PolicyText, Temperature, TopK, TopP, opened, sampling_of
from steer.cli.options import Json, Out, Quiet, Resume, Rows, Runnable, Seed
from steer.cli.output import Output

TaskText = Annotated[
    str,
    typer.Option(
        "--task",
        show_default=False,
        help="chain, chain:fit, gsm8k:FILE, math500:FILE, or jsonl:FILE with question and answer on every line.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, show_default=False, help="Only the first so many questions.")
]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, help="Replies per question.")]
Instruction = Annotated[
    str | None,
    typer.Option(
        "--instruction", show_default="the task's", help="Appended to every question; an empty text appends nothing."
    ),
]


def command(
    subject: Runnable,
    task: TaskText,
    out: Out,
    limit: Limit = None,
    samples: Samples = 1,
    instruction: Instruction = None,
    policy: PolicyText = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = None,
    no_thinking: NoThinking = False,
    resume: Resume = False,
    batch_size: Rows = None,
    engine: Engine = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a task: accuracy, lengths and closure, with intervals. Writes a run folder."""
    from experiments.evaluate import evaluate, refuse_folder
    from experiments.tasks.registry import named
    from experiments.think_policies import parse_policy

    output = Output(json, quiet)
    refuse_folder(out, resume)
    chosen = named(task, instruction)
    chosen.items(limit)
    with opened(subject, batch_size, engine) as model, output.progress("evaluate") as bar:
        run = evaluate(
            model,
            chosen,
            out=out,
            sampling=sampling_of(
                model, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens
            ),
            samples=samples,
            seed=seed,
            policy=None if policy is None else parse_policy(policy, model.marks, model.tokenizer),
            thinking=False if no_thinking else None,
            limit=limit,
            batch_size=batch_size,
            resume=resume,
            progress=lambda state: bar.to(state.done, state.total, f"{state.tokens_per_second:.0f} tokens/s"),
        )
    output.text(f"{subject} on {task}: {out}\n{run}")
    output.result({"out": out, "subject": subject, "task": task, **run.summary})
