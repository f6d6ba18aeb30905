"""`steer inspect`: what a model is made of, and which forms of change fit it; from headers, no weights loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.anatomy.forms import FORMS, reaches
from steer.anatomy.headers import Headers, read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.record import read_record
from steer.anatomy.resolve import Anatomy, Contributes, resolve
from steer.anatomy.slots import WORDS
from steer.cli.options import Json, Quiet, Seed
from steer.cli.output import Output
from steer.errors import SteerError
from steer.identity import ModelIdentity, shape_id
from steer.ranges import ranges
from steer.sites import SITES
from steer.sources import locate
from steer.subjects import Subject, load_change, parse
from steer.vocabulary import tokenizer_id_of
from steer.weights import weights_id

if TYPE_CHECKING:
    from steer.anatomy.selfcheck import SelfCheck

GIB = 2**30


def command(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="MODEL[+FILE]",
            show_default=False,
            help="A hub id, a folder, a file.gguf, or organism:chain (bundled); with FILE, a steering or a patch, its coverage.",
        ),
    ],
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Load the model and prove its anatomy by one short forward pass.")
    ] = False,
    anatomy: Annotated[
        Path | None, typer.Option("--anatomy", help="Your own record of the family (YAML).", show_default=False)
    ] = None,
    hash_all: Annotated[
        bool, typer.Option("--hash", help="Read and hash the weights if their id is not known.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
) -> None:
    """Print anatomy, coverage per form and identity of a model; reads headers only, unless asked for more."""
    output = Output(json, quiet)
    asked = parse(subject)
    source = locate(asked.model)
    headers = read_headers(source.folder)
    record = None if anatomy is None else read_record(anatomy)
    found = resolve(headers.config, shapes_of(headers.config, headers.shapes), record)
    identity = ModelIdentity(
        source.name,
        found.family,
        shape_id(found.numbers()),
        weights_id(source.folder, headers.files, hash_all),
        tokenizer_id_of(source.folder),
    )
    rows = reaches(found, _quantised(headers))
    result: dict[str, Any] = {
        **_anatomy(found, headers),
        "coverage": [asdict(row) for row in rows],
        "identity": identity.to_dict(),
    }
    _print(output, result)
    table: dict[str, list[str]] = {}
    for row in rows:
        table.setdefault(row.change, [row.change]).append(str(row))
    output.table("forms (layers reached)", ("change of all tokens", *FORMS), list(table.values()))
    for why in dict.fromkeys(f"{row.form}, {row.change}: {row.why}" for row in rows if row.why):
        output.text(f"  {why}")
    if asked.changes:
        result["changes"] = _coverage(output, asked, anatomy)
    if self_check:
        result["self_check"] = _self_check(output, asked.model, anatomy)
    output.result(result)


def _quantised(headers: Headers) -> str:
    found = headers.config.get("quantization_config")
    return str(found.get("quant_method", "unknown method")) if isinstance(found, Mapping) else ""


def _anatomy(anatomy: Anatomy, headers: Headers) -> dict[str, Any]:
    dense = anatomy.dense_mlp_layers
    return {
        "folder": headers.folder,
        **anatomy.numbers(),
        "tied": anatomy.tied,
        "attention_contribution": asdict(anatomy.attention_contribution),
        "mlp_contribution": asdict(anatomy.mlp_contribution),
        "dense_mlp_layers": list(dense),
        "biases": {
            name: sum(module == name for module, _ in anatomy.biases) for name in ("attention_output", "mlp_output")
        },
        "linear_layers": list(anatomy.linear_layers),
        "experts": anatomy.experts,
        "chosen": anatomy.chosen,
        "expert_layers": list(anatomy.expert_layers),
        "stored": _stored(anatomy),
        "sites": {name: len(anatomy.site_layers(name)) for name in SITES},
        "tensors": len(headers.tensors),
        "files": list(headers.files),
        "bytes": headers.bytes,
        "dtypes": headers.dtypes,
    }


def _stored(anatomy: Anatomy) -> dict[str, str]:
    """How the matrices of each word lie in the checkpoint: how many there are, and how many tensors hold them."""
    found = {}
    for word in WORDS:
        matrices = anatomy.matrices(word)
        tensors = {anatomy.on_disk(matrix).name for matrix in matrices}
        if word == "head" and anatomy.tied:
            found[word] = "the embedding"
        elif len(tensors) < len(matrices):
            found[word] = f"{len(matrices)} in {len(tensors)} fused tensors"
        elif matrices:
            found[word] = str(len(matrices))
    return found


def _print(output: Output, result: Mapping[str, Any]) -> None:
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in result["dtypes"].items())
    where = f"{len(result['files'])} file{'s' * (len(result['files']) != 1)}, {result['bytes'] / GIB:.3g} GiB"
    output.text(f"{result['identity']['name']}: {result['family']}, {result['tensors']} tensors ({kinds}), {where}")
    numbers = ("layers", "hidden", "heads", "kv_heads", "head_width", "vocab", "tied")
    output.text("  " + ", ".join(f"{name} {result[name]}" for name in numbers))
    for part in ("attention", "mlp"):
        shown = _shown(Contributes(**result[f"{part}_contribution"]))
        output.text(f"  {part}: {shown}; output biases on {result['biases'][f'{part}_output']} layers")
    if result["linear_layers"]:
        output.text(f"  linear attention, without heads, on {len(result['linear_layers'])} layers")
    if result["experts"]:
        chosen = f", {result['chosen']} chosen for a token" if result["chosen"] else ""
        where = f"{len(result['expert_layers'])} layers ({ranges(result['expert_layers'])})"
        output.text(f"  {result['experts']} experts on each of {where}{chosen}")
    output.text("  matrices: " + ", ".join(f"{word} {text}" for word, text in result["stored"].items()))
    output.text(
        "  sites: " + ", ".join(f"{name} {count}/{result['layers']}" for name, count in result["sites"].items())
    )
    output.text(
        "  "
        + ", ".join(f"{name} {result['identity'][name][:12]}" for name in ("shape_id", "weights_id", "tokenizer_id"))
    )


def _shown(contribution: Contributes) -> str:
    words = {
        "identity": "added to the stream as it is",
        "scale": f"added to the stream times {contribution.multiplier:g}",
        "norm": f"added to the stream through the norm {contribution.norm}",
    }
    return words[contribution.kind]


def _coverage(output: Output, asked: Subject, anatomy: Path | None) -> list[dict[str, Any]]:
    if anatomy is not None:
        raise SteerError(
            "the coverage of a change was asked for with --anatomy",
            "a family whose record is bundled",
            "Inspect the model alone, or see what `steer apply --anatomy FILE --dry-run` would do",
        )
    from steer.coverage import coverage

    found = []
    for path, _ in asked.changes:
        change = load_change(path, asked.model)
        shown = [coverage(change, asked.model, "hook"), coverage(change, asked.model, "vllm")]
        shown += [coverage(change, asked.model, "patch"), coverage(change, asked.model, "lora")]
        for each in shown:
            output.text(f"{path.name}: {each}")
        found.append({"file": path, "coverage": [each.to_dict() for each in shown]})
    return found


def _self_check(output: Output, model: str, anatomy: Path | None) -> dict[str, Any]:
    from steer.anatomy.selfcheck import self_check
    from steer.model import load

    check: SelfCheck = self_check(load(model, anatomy=anatomy, self_check=False))
    output.table(
        f"self-check: passed on {check.layers} layers with {check.tokens} tokens, tolerance {check.tolerance:g}",
        ("identity", "largest relative difference"),
        [(name, f"{difference:.1e}") for name, difference in check.differences.items()],
    )
    return asdict(check)
