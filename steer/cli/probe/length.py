"""`steer probe length`: the direction from short to long thoughts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.lists import numbers
from steer.cli.options import Json, Model, Out, Quiet, Seed
from steer.cli.output import Output
from steer.cli.probe.source import From, Picture, is_summary, refuse_existing, summary_for
from steer.errors import SteerError

if TYPE_CHECKING:
    from probes.collect.summary import Summary
    from steer.directions import Direction
    from steer.steering import Steering

Site = Annotated[str, typer.Option("--site", help="Where the vectors are measured.")]
Span = Annotated[str, typer.Option("--span", help="Positions that are averaged.")]
Below = Annotated[int, typer.Option("--below", min=1, help="Short: fewer thinking tokens than this.")]
Above = Annotated[int, typer.Option("--above", min=0, help="Long: more thinking tokens than this.")]
Percentiles = Annotated[
    tuple[float, float] | None,
    typer.Option("--percentiles", metavar="LOW HIGH", show_default=False, help="Instead of the thresholds: 20 80."),
]
ByGroup = Annotated[bool, typer.Option("--by-group", help="Compare within groups of items of equal size.")]
SteeringFile = Annotated[
    Path | None,
    typer.Option(
        "--steering",
        show_default=False,
        help="Also write a steering (.yaml) that adds the direction; run it as MODEL+FILE@COEFFICIENT.",
    ),
]
AddAt = Annotated[str, typer.Option("--add-at", help="Site at which the steering adds the direction.")]
AddLayers = Annotated[
    list[str] | None,
    typer.Option("--add-layers", show_default="all", help="Layers of the steering, such as 2,3 or 10-20."),
]
Unclosed = Annotated[bool, typer.Option("--include-unclosed", help="Take thoughts that never close, too.")]


def command(
    model: Model,
    source: From,
    out: Out,
    site: Site = "resid_mid",
    span: Span = "predicts_thinking",
    below: Below = 100,
    above: Above = 1000,
    percentiles: Percentiles = None,
    by_group: ByGroup = False,
    include_unclosed: Unclosed = False,
    plot: Picture = None,
    steering: SteeringFile = None,
    add_at: AddAt = "attn_out",
    add_layers: AddLayers = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the direction from short to long thoughts: mean(long) - mean(short) per layer."""
    from probes.directions import length_direction

    output = Output(json, quiet)
    refuse_existing(out, plot, *_files_of(steering, out))
    summary = _summary(model, source, site, span, output)
    direction = length_direction(
        summary,
        site=site,
        span=span,
        below=below,
        above=above,
        percentiles=percentiles,
        by_group=by_group,
        include_unclosed=include_unclosed,
        seed=seed,
    )
    made = None if steering is None else _steering(direction, add_at, add_layers, steering.stem)
    direction.save(out)
    if made is not None and steering is not None:
        made.save(steering)
        output.remark(f"Steer with it: steer generate {model}+{steering}@0.5 …")
    if plot is not None:
        _draw(summary, direction, plot, seed)
    _tell(direction, out, output)


def _files_of(steering: Path | None, direction: Path) -> tuple[Path, ...]:
    if steering is None:
        return ()
    vectors = steering.with_suffix(".safetensors")
    if steering.suffix != ".yaml" or vectors == direction:
        raise SteerError(
            f"--steering names {steering}, whose vectors would lie in {vectors}",
            "a name that ends in .yaml and is not that of --out",
            "For example --steering longer.yaml",
        )
    return steering, vectors


def _steering(direction: Direction, site: str, layers: list[str] | None, name: str) -> Steering:
    """Make `Add` with coefficient 1, so that the subject's @COEFFICIENT is the strength."""
    from steer.interventions import Add
    from steer.steering import Steering

    chosen = numbers(layers, "add-layers")
    return Steering((Add(direction, site, layers=None if chosen is None else tuple(chosen)),), name=name)


def _summary(model: str, source: Path, site: str, span: str, output: Output) -> Summary:
    """Read a summary by headers alone; load the model only where a run has to be read."""
    if is_summary(source):
        from probes.collect.summary import Summary
        from steer.subjects import parse
        from steer.targets import target_of

        summary = Summary.load(source)
        summary.check_model(target_of(parse(model).model).identity)
        return summary
    from steer.subjects import open_subject

    return summary_for(open_subject(model), source, (site,), span, output)


def _draw(summary: Summary, direction: Direction, plot: Path, seed: int) -> None:
    from probes.directions import split_half
    from probes.plots import direction_figure
    from steer.files import replacing

    told = (direction.provenance.get("options") or {}).get("split_half")
    stability = split_half(summary, direction, seed=seed) if told else None
    with replacing(plot) as partial:
        direction_figure(direction, stability, "Length direction").savefig(partial, format=plot.suffix[1:] or "png")


def _tell(direction: Direction, out: Path, output: Output) -> None:
    options: dict[str, Any] = direction.provenance["options"]
    counts, halves = options["counts"], options["split_half"]
    cosines = dict(zip(halves["layers"], halves["mean"], strict=True)) if halves else {}
    rows = [[layer, norm, cosines.get(layer)] for layer, norm in direction.norms.items()]
    edges = ", ".join(f"{label}: {below:g} / {above:g}" for label, (below, above) in options["edges"].items())
    title = f"{out}: {counts['short']} short and {counts['long']} long traces (short / long at {edges} tokens)"
    output.table(title, ["layer", "norm", "split-half cosine"], rows)
    left_out = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    output.remark(f"Of the traces: {left_out}.")
    table = [{"layer": layer, "norm": norm, "split_half_cosine": cosine} for layer, norm, cosine in rows]
    output.result(
        {"direction": out, "site": direction.site, "fingerprint": direction.fingerprint, "layers": table, **options}
    )
