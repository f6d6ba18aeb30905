"""`steer generate`: one reply to the terminal, its thinking dimmed, or many into a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.engine import Engine, engine_options
from steer.cli.options import Json, Quiet, Rows, Runnable, Seed
from steer.cli.output import Output
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.backends.vllm.llm import SteeredLLM
    from steer.model import SteerableModel
    from steer.prompts import Prompt
    from steer.sampling import Sampling
    from steer.traces import Traces

Text = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPT]", show_default=False, help="A user's message; raw text if the model has no chat template."
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        show_default=False,
        help="A file of prompts: one per line, or .jsonl with prompt or messages, id, group, gold.",
    ),
]
PolicyText = Annotated[
    str | None,
    typer.Option(
        "--policy",
        show_default=False,
        help="budget:N closes a thought after N tokens; budget:N:TEXT writes TEXT first; min:N keeps it open for N; "
        "tip:ALPHA:STEPS[:WORD,WORD] makes words that begin another thought less likely.",
    ),
]
Samples = Annotated[int, typer.Option("-n", "--samples", min=1, help="Replies per prompt.")]
OutFolder = Annotated[
    Path | None, typer.Option("--out", show_default=False, help="Write a run folder, which must not exist yet.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, show_default="the model's", help="0 takes the likeliest token."),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", show_default="the model's", help="Sum of the probabilities kept.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, show_default="the model's", help="Tokens kept; 0 keeps all.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, show_default="the model's", help="Longest reply.")
]
NoThinking = Annotated[bool, typer.Option("--no-thinking", help="Turn thinking off by the chat template's own switch.")]
Raw = Annotated[bool, typer.Option("--raw", help="Give PROMPT to the model as it is, without the chat template.")]
System = Annotated[str | None, typer.Option("--system", show_default=False, help="A system prompt.")]


def command(
    subject: Runnable,
    prompt: Text = None,
    prompts: File = None,
    policy: PolicyText = None,
    samples: Samples = 1,
    out: OutFolder = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = None,
    no_thinking: NoThinking = False,
    raw: Raw = False,
    system: System = None,
    batch_size: Rows = None,
    engine: Engine = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write replies: to the terminal, or many into a run folder."""
    from experiments.think_policies import parse_policy
    from steer.promptfile import read_prompts
    from steer.traces import refuse_folder

    output = Output(json, quiet)
    if (prompt is None) == (prompts is None):
        raise SteerError(
            "PROMPT and --prompts were both given" if prompt is not None else "neither PROMPT nor --prompts was given",
            "exactly one of them",
            'For example steer generate organism:chain "a = 3 ; b = a + 4 ; ? b"',
        )
    if out is not None:
        refuse_folder(out)
    read = None if prompts is None else read_prompts(prompts)
    with opened(subject, batch_size, engine) as model:
        asked = as_asked(model, prompt, read, raw, system)
        options: dict[str, Any] = {
            "sampling": sampling_of(
                model, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens
            ),
            "samples": samples,
            "policy": None if policy is None else parse_policy(policy, model.marks, model.tokenizer),
            "seed": seed,
            "thinking": False if no_thinking else None,
        }
        if batch_size is not None:
            options["batch_size"] = batch_size
        if out is None and not json and len(asked) * samples == 1:
            stream(model, asked[0], options)
            return
        with output.progress("generate", len(asked) * samples) as bar:
            traces = model.generate(
                asked,
                **options,
                progress=lambda state: bar.to(state.done, state.total, f"{state.tokens_per_second:.0f} tokens/s"),
            )
    traces.meta["subject"] = subject
    if out is not None:
        traces.save(out)
    tell(output, traces, out)


@contextmanager
def opened(
    subject: str, batch_size: int | None = None, engine: list[str] | None = None
) -> Iterator[SteerableModel | SteeredLLM]:
    """What a subject names: a model in this process, or an engine of vLLM, which is stopped at the end.

    Args:
        subject: with vllm: before it for an engine.
        batch_size: requests of an engine that run together; None leaves its default.
        engine: further options of an engine, as `--engine` has them.
    """
    from steer.subjects import open_engine, open_subject, parse

    backend = parse(subject).backend
    options = engine_options(engine, backend == "vllm", own=("max_num_seqs",))
    if backend == "hf":
        yield open_subject(subject)
        return
    together: dict[str, Any] = {} if batch_size is None else {"max_num_seqs": batch_size}
    with open_engine(subject, **together, **options) as running:
        yield running


def as_asked(
    model: SteerableModel | SteeredLLM, prompt: str | None, read: list[Prompt] | None, raw: bool, system: str | None
) -> list[Prompt]:
    """The prompts as the model is to get them: plain texts become a user's message where there is a chat template."""
    from steer.promptfile import as_message
    from steer.prompts import Prompt

    given = [Prompt("00000", prompt)] if prompt is not None else read or []
    return [
        replace(each, content=as_message(each.content, model.tokenizer, raw, system))
        if isinstance(each.content, str)
        else each
        for each in given
    ]


def sampling_of(model: SteerableModel | SteeredLLM, **told: float | None) -> Sampling:
    """The model's own sampling with what the caller told instead."""
    from steer.sampling import Sampling

    return replace(Sampling.of(model), **{name: value for name, value in told.items() if value is not None})  # type: ignore[arg-type]


def stream(model: SteerableModel | SteeredLLM, prompt: Prompt, options: dict[str, Any]) -> None:
    """Type one reply to stdout while it is written."""
    from rich.console import Console

    from steer.cli.typing_out import Typist
    from steer.sampling import end_tokens

    rendered = model.render(prompt.content, options["thinking"])
    typist = Typist(model.tokenizer, model.marks, rendered, end_tokens(model), Console(highlight=False))
    model.generate([prompt], **options, on_token=lambda _prompt, _sample, token: typist.take(token))
    typist.end()


def tell(output: Output, traces: Traces, out: Path | None) -> None:
    """Say what was written; without a folder the replies themselves."""
    from dataclasses import asdict

    thoughts = [trace for trace in traces if trace.thinking_tokens is not None]
    lengths = [trace.thought_length for trace in traces]
    numbers = {
        "replies": len(traces),
        "tokens": sum(len(trace.completion_token_ids) for trace in traces),
        "mean_thought_length": sum(lengths) / len(lengths),
        "with_thought": len(thoughts),
        "closed": sum(bool(trace.closed) for trace in thoughts),
        "cut_by_length": sum(trace.finish_reason == "length" for trace in traces),
        "touched_by_policy": sum(bool(trace.forced) or trace.finish_reason == "policy" for trace in traces),
    }
    if out is None:
        for trace in traces:
            output.text(f"[{trace.id}] {trace.text}")
        output.result({**numbers, "meta": traces.meta, "traces": [asdict(trace) for trace in traces]})
        return
    output.table(str(out), list(numbers), [list(numbers.values())])
    output.result({"out": out, **numbers})
