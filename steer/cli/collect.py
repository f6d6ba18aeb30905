"""`steer collect`: read a model over the traces of a run, once, into a summary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.engine import Engine, engine_options
from steer.cli.lists import numbers, words
from steer.cli.options import Json, Out, Quiet, Resume, Runnable, Seed
from steer.cli.output import Bar, Output
from steer.errors import SteerError

if TYPE_CHECKING:
    from probes.collect.plan import Plan
    from probes.collect.progress import Progress
    from probes.collect.reader import Reader
    from probes.collect.recorders import Recorder
    from probes.collect.summary import Summary
    from steer.model import SteerableModel

CACHE = "STEER_CACHE"
"""Names the cache of every verb that reads a run."""

TracesOption = Annotated[
    Path, typer.Option("--traces", show_default=False, help="A run folder, or a .jsonl file of traces.")
]
Sites = Annotated[
    list[str] | None,
    typer.Option("--sites", show_default="resid_mid,z", help="Sites to average, between commas or repeated."),
]
Spans = Annotated[
    list[str] | None,
    typer.Option("--spans", show_default="predicts_thinking", help="A span to average over; repeat for several."),
]
Layers = Annotated[
    list[str] | None, typer.Option("--layers", show_default="all", help="Such as 0-5,9; between commas or repeated.")
]
Recorders = Annotated[
    list[str] | None,
    typer.Option(
        "--recorder",
        metavar="NAME[:OPTION=VALUE,…]",
        show_default=False,
        help="Such as segment_means:every=500; repeat for several. They take the place of the sites, unless --sites is given too.",
    ),
]
Keep = Annotated[str, typer.Option("--keep", help="One row per trace, or per group: trace or group.")]
Kept = Annotated[str, typer.Option("--dtype", help="Of the kept means: float32, bfloat16, float16 or float64.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens of one forward pass, with padding.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, show_default=False, help="Leave longer traces out, and count them.")
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        show_default="that of the subject",
        help="hf or vllm; vllm is the same as vllm: before the subject.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        envvar=CACHE,
        show_envvar=False,
        show_default=False,
        help="A folder: take what was read before from it, say so, and keep there what is read now.",
    ),
]


def command(
    subject: Runnable,
    traces: TracesOption,
    out: Out,
    sites: Sites = None,
    spans: Spans = None,
    recorder: Recorders = None,
    layers: Layers = None,
    keep: Keep = "trace",
    dtype: Kept = "float32",
    batch_tokens: BatchTokens = 8192,
    max_tokens: MaxTokens = None,
    backend: Backend = None,
    engine: Engine = None,
    cache: Cache = None,
    resume: Resume = False,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a model over the traces of a run, once: means per trace at sites, over spans, of every layer."""
    from probes.collect.job import SPANS
    from probes.collect.run import check_out, collect
    from probes.collect.team import leads

    del seed  # Nothing is random here.
    output = Output(json and leads(), quiet or not leads())
    if leads():
        check_out(out, resume)
    recorders = recorders_of(recorder, sites, spans)
    chosen = numbers(layers, "layers")
    last: list[Progress] = []
    with (
        opened(_named(subject, backend), recorders, chosen, batch_tokens, output, engine) as reads,
        output.progress("collect") as bar,
        _keeping_the_finished_part(last, out),
    ):
        summary = collect(
            reads,
            traces,
            out,
            recorders=recorders,
            spans=spans or SPANS,
            layers=chosen,
            keep="group" if keep == "group" else "trace" if keep == "trace" else _wrong(keep),
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            resume=resume,
            cache=cache,
            progress=follow(output, bar, last),
        )
    if leads():
        _tell(summary, out, last, output)


def recorders_of(texts: list[str] | None, sites: list[str] | None, spans: list[str] | None) -> list[Recorder]:
    """Return the recorders that the options name: the default ones for the sites, and those of `--recorder`.

    Raises:
        SteerError: an unknown recorder or option, or spans without a site to which they belong.
    """
    from probes.collect.job import SITES, SPANS, Options
    from probes.collect.named import parse

    named = [parse(text) for text in texts or []]
    if named and spans and not sites:
        raise SteerError(
            f"--spans {spans[0]} stands beside --recorder, without --sites",
            "spans for the sites that are averaged",
            "Give the span to the recorder, such as segment_means:span=thinking, or name --sites too",
        )
    if named and not sites:
        return named
    return [*Options(words(sites) or SITES, spans or SPANS).chosen_recorders(), *named]


def _named(subject: str, backend: str | None) -> str:
    """The subject with the back end that was asked for."""
    if backend not in (None, "hf", "vllm") or (backend == "hf" and subject.startswith("vllm:")):
        raise SteerError(f"--backend {backend} was asked for of {subject}", "hf or vllm, and hf without vllm:")
    return f"vllm:{subject}" if backend == "vllm" and not subject.startswith("vllm:") else subject


@contextmanager
def opened(
    subject: str,
    recorders: Sequence[Recorder],
    layers: Sequence[int] | None,
    batch_tokens: int,
    output: Output,
    engine: list[str] | None = None,
) -> Iterator[SteerableModel | Reader]:
    """Yield what reads: a model in this process, or an engine of vLLM that is started for it and stopped at the end.

    Args:
        subject: with vllm: before it for an engine.
        recorders, layers: what the engine is to read.
        batch_tokens: of one step of the engine.
        output: is told what the engine's buffers need.
        engine: further options of an engine, as `--engine` has them.

    Raises:
        SteerError: the subject cannot be opened, vLLM cannot record that, or several processes of torchrun ask for it.
    """
    from probes.collect.team import launched, own_device
    from steer.shards import SHARD
    from steer.subjects import open_engine, open_subject, parse

    asked = parse(subject)
    if asked.backend == "hf":
        engine_options(engine, False)
        yield open_subject(subject, device=own_device())
        return
    if launched():
        raise SteerError(
            "torchrun shares a collection between processes, and vLLM has processes of its own",
            "one process",
            "Run the command without torchrun",
        )
    from probes.collect.vllm import VllmReader, places
    from steer.backends.vllm.capture_read import buffer_bytes
    from steer.backends.vllm.known import Known

    known = Known.of(asked.model)
    found = places(recorders, known, layers)
    together = min(SHARD, batch_tokens)
    own: dict[str, Any] = {"capture": found, "max_num_batched_tokens": batch_tokens, "max_num_seqs": together}
    with open_engine(subject, **own, **engine_options(engine, True, own)) as running:
        size = buffer_bytes(found, batch_tokens, known.anatomy.hidden, known.anatomy.chosen, running.dtype.itemsize)
        output.remark(f"vLLM reads at {len(found)} places; their buffers take {size / 1e6:.1f} MB on the device")
        yield VllmReader(running)


def _wrong(keep: str) -> Any:
    raise SteerError(f"--keep {keep} was asked for", "trace or group")


@contextmanager
def _keeping_the_finished_part(last: list[Progress], out: Path) -> Iterator[None]:
    """Say, when the disk refuses, what is finished and how to go on."""
    try:
        yield
    except OSError as error:
        if not last:
            raise
        raise SteerError(
            f"{error.strerror or error} ({error.filename})",
            "",
            f"{last[-1].shards} of {len(last[-1].plan.shards)} shards are finished and stay in {out}; "
            "make room or correct the rights, and run the same command with --resume",
        ) from error


def _tell(summary: Summary, out: Path, last: list[Progress], output: Output) -> None:
    from probes.collect.summary_file import shape_text

    told = describe(summary)
    output.table(
        f"{out}: {told['traces']['read']} of {told['traces']['given']} traces, {len(told['layers'])} layers",
        ["kept", "shape of a row", "span"],
        [[name, shape_text(kept["shape"], kept["every"]), kept["span"]] for name, kept in told["quantities"].items()],
    )
    end = last[-1] if last else None
    if end is None:
        output.remark(f"{out} was finished before; nothing was read.")
    work = {} if end is None else {"resumed": end.resumed, "read": end.read, "seconds": end.seconds}
    cache = (
        None
        if end is None or end.cache is None
        else {
            "folder": end.cache.folder,
            "traces": dict(end.cached),
            "damaged": end.damaged,
            "not_used": end.cache.refused,
        }
    )
    output.result({"summary": out, **told, "work": work, "cache": cache})


def follow(output: Output, bar: Bar, last: list[Progress] | None = None) -> Callable[[Progress], None]:
    """Return what tells a collection's plan first, then moves the bar, and at its end says what was done.

    Args:
        output: where remarks go.
        bar: to move.
        last: is made to hold the newest state alone.
    """
    said: set[str] = set()

    def tell(state: Progress) -> None:
        plan = state.plan
        if last is not None:
            last[:] = [state]
        if "plan" not in said:
            said.add("plan")
            output.remark(
                f"{plan.read} traces, {plan.tokens} tokens, {len(plan.shards)} shards; "
                f"{plan.plan_bytes / 1e6:.1f} MB will be kept{_remarks(plan)}"
            )
            _tell_cache(state, output)
        bar.to(
            state.traces, plan.read, f"{state.traces_per_second:.1f} traces/s, {state.tokens_per_second:.0f} tokens/s"
        )
        if state.shards == len(plan.shards) and "end" not in said:
            said.add("end")
            _tell_end(state, output)

    return tell


def _tell_cache(state: Progress, output: Output) -> None:
    """Say which recorders the cache can serve, before anything runs."""
    if state.cache is None:
        return
    if state.cache.refused:
        output.remark(f"The cache {state.cache.folder} is not used: {state.cache.refused}.")
    for name, shards in state.there:
        output.remark(f"cache {state.cache.folder}: {name} has {shards} of {len(state.plan.shards)} shards.")


def _tell_end(state: Progress, output: Output) -> None:
    parts = [f"{state.read} traces and {state.read_tokens} tokens read in {state.seconds:.1f} s"]
    if state.read:
        parts.append(f"{state.traces_per_second:.1f} traces/s, {state.tokens_per_second:.0f} tokens/s")
    if state.resumed:
        parts.append(f"{state.resumed} traces were finished before")
    parts += [f"{name} of {count} traces was taken from the cache" for name, count in state.cached if count]
    if state.damaged:
        parts.append(f"{state.damaged} damaged files of the cache were made again")
    output.remark("; ".join(parts) + ".")


def _remarks(plan: Plan) -> str:
    parts = [f"{count} traces left out ({reason})" for reason, count in plan.dropped.items()]
    parts += [f"{plan.unclosed} thoughts not closed"] if plan.unclosed else []
    parts += [f"{plan.truncated} replies cut by the token limit"] if plan.truncated else []
    return "".join(f"; {part}" for part in parts)


def describe(summary: Summary) -> Mapping[str, Any]:
    """Return what `summary.yaml` says, without its shards."""
    return dict(summary.meta)
