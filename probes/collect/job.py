"""What a collection is before it runs: recorders that know their model, a plan, and what the summary will say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probes.collect.hooked import HookReader
from probes.collect.means import HeadMeans, SpanMeans
from probes.collect.plan import Plan, make_plan
from probes.collect.reader import Model, Reader
from probes.collect.recorders import Kept, Layers, Prepared, Recorder
from probes.collect.summary_file import KIND, describe
from probes.collect.trace_source import by_id
from steer import artifacts
from steer.errors import SteerError
from steer.model import SteerableModel
from steer.traces import Trace, Traces

SITES = ("resid_mid", "z")
SPANS = ("predicts_thinking",)
BATCH_TOKENS = 8192
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Options:
    """What shapes a summary; the arguments of `collect` under the same names."""

    sites: Sequence[str] = SITES
    spans: Sequence[str] = SPANS
    layers: Sequence[int] | None = None
    keep: str = "trace"
    groups: Mapping[str, str] | None = None
    recorders: Sequence[Recorder] | None = None
    dtype: str = "float32"
    batch_tokens: int = BATCH_TOKENS
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        small = self.batch_tokens < 1 or (self.max_tokens is not None and self.max_tokens < 1)
        if self.keep not in ("trace", "group") or self.dtype not in DTYPES or small:
            raise SteerError(
                f"keep={self.keep!r}, dtype={self.dtype!r}, batch_tokens={self.batch_tokens} and "
                f"max_tokens={self.max_tokens} were asked for",
                f"keep trace or group, a dtype among {', '.join(DTYPES)}, at least one token",
            )
        if self.groups is not None and self.keep != "group":
            raise SteerError("groups were given, but every trace is kept", "groups beside keep='group'")

    def chosen_recorders(self) -> tuple[Recorder, ...]:
        """Return the recorders: those given, else `SpanMeans` for the sites but `z`, and `HeadMeans` for `z`.

        Raises:
            SteerError: there is none.
        """
        if self.recorders is not None:
            found = list(self.recorders)
        else:
            plain = tuple(site for site in dict.fromkeys(self.sites) if site != "z")
            spans = tuple(dict.fromkeys(self.spans))
            found = [SpanMeans(plain, spans)] if plain else []
            found += [HeadMeans(spans)] if "z" in self.sites else []
        if not found:
            raise SteerError(
                "nothing is to be recorded", "at least one site or recorder", "Name a site, such as --sites resid_mid"
            )
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Job:
    """A collection that is ready to run.

    Attributes:
        reader: that will read.
        recorders: as chosen.
        prepared: the same, knowing the model.
        plan: its traces.
        meta: what `summary.yaml` will hold, without the shards.
        options: as given.
    """

    reader: Reader
    recorders: tuple[Recorder, ...]
    prepared: tuple[Prepared, ...]
    plan: Plan
    meta: dict[str, Any]
    options: Options


def prepare(reads: SteerableModel | Reader, traces: Traces | Iterable[Trace] | str | Path, options: Options) -> Job:
    """Return the job of reading `traces`; errors as `probes.collect`."""
    reader = HookReader(reads) if isinstance(reads, SteerableModel) else reads
    model = reader.model
    recorders = options.chosen_recorders()
    layers = _layers(model, options.layers)
    prepared = tuple(reader.prepare(recorder, layers) for recorder in recorders)
    keeps = _keeps(prepared, options.keep)
    spans = tuple(dict.fromkeys(span for one in prepared for span in one.spans))
    plan = make_plan(
        model,
        by_id(traces, model.identity.tokenizer_id),
        spans,
        keeps,
        dtype=DTYPES[options.dtype],
        label=_label(options),
        max_tokens=options.max_tokens,
        longest=reader.longest,
    )
    meta = {
        "format_version": artifacts.FORMAT_VERSION,
        "kind": KIND,
        "code_version": artifacts.code_version(),
        "model": model.identity.to_dict(),
        "changes": list(model.change_ids),
        "traces": _counted(plan, options.max_tokens),
        "recorders": [{"name": recorder.name, **recorder.options()} for recorder in recorders],
        "layers": list(layers),
        "keep": options.keep,
        "dtype": options.dtype,
        "batch_tokens": options.batch_tokens,
        "plan_bytes": plan.plan_bytes,
        "quantities": {name: describe(kept) for name, kept in keeps.items()},
    }
    return Job(reader, recorders, prepared, plan, meta, options)


def _label(options: Options) -> Callable[[Trace], str | None] | None:
    """Return what tells the group of a trace, where groups are kept."""
    if options.keep == "trace":
        return None
    given = options.groups
    return (lambda trace: trace.group) if given is None else (lambda trace: given.get(trace.id))


def _keeps(prepared: Sequence[Prepared], keep: str) -> dict[str, Kept]:
    keeps: dict[str, Kept] = {}
    for one in prepared:
        twice = sorted(set(keeps) & set(one.keeps))
        if twice:
            raise SteerError(f"two recorders keep {twice[0]}", "each quantity once", "Leave one of them out")
        keeps.update(one.keeps)
        for name, kept in one.keeps.items():
            if kept.span is not None and kept.span not in one.spans:
                raise SteerError(
                    f"a recorder keeps {name} over the span {kept.span!r}, which it does not ask for",
                    f"a span among {', '.join(one.spans) or 'those of its `Prepared`'}",
                    "Name it in `Prepared.spans`",
                )
    ragged = [name for name, kept in keeps.items() if kept.every is not None]
    if ragged and keep == "group":
        raise SteerError(
            f"{ragged[0]} has as many parts as a trace is long, which groups cannot add up",
            "keep='trace' for quantities in parts",
            "Keep traces (--keep trace), or record without `every`",
        )
    return keeps


def _counted(made: Plan, max_tokens: int | None) -> dict[str, Any]:
    counts = {"hash": made.traces_hash, "given": made.given, "read": made.read, "tokens": made.tokens}
    return counts | {
        "dropped": dict(made.dropped),
        "unclosed": made.unclosed,
        "truncated": made.truncated,
        "max_tokens": max_tokens,
    }


def _layers(model: Model, layers: Sequence[int] | None) -> Layers:
    count = model.anatomy.layers
    found = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not found or found[0] < 0 or found[-1] >= count:
        raise SteerError(
            f"layers {list(found)} were asked for", f"layers among 0 to {count - 1}", "See `steer inspect MODEL`"
        )
    return found
