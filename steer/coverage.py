"""Coverage: before anything runs, what a form will touch of a model, counted against what exists.

    >>> print(coverage(steering, "models/qwen3", form="hook"))          # doctest: +SKIP
    hook form, 2 of 2 parts
      Add at attn_out: attention output 28/28 layers
      ProjectOut at head_out: attention output 3/28 layers, 4 heads

A part that the form cannot express (the table of DESIGN §4 in `steer.form_table`) is refused, and says what to do instead.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from steer import form_table
from steer.anatomy.packed import METHOD
from steer.anatomy.resolve import PER_LAYER
from steer.anatomy.slots import EXPERTS, OUTSIDE
from steer.conflicts import noted
from steer.directions import unit_vector
from steer.errors import SteerError
from steer.form_table import Form, Verdict
from steer.identity import check_same
from steer.interventions import Intervention, ProjectOut, ScaleExperts
from steer.operations import AddBias, AddDense, AddLowRank, Matrix, Operation, ProjectColumns, Scale, exponents
from steer.patches import Patch
from steer.steering import Steering
from steer.tables import table
from steer.targets import Target, target_of
from steer.writers import bias_form, check_heads, has_bias

if TYPE_CHECKING:
    import pandas

    from steer.model import SteerableModel

ROUNDING = 1e-6
Refusal = tuple[str, str]  # Why, and what to do instead.


@dataclass(frozen=True)
class Row:
    """One part of the model.

    Attributes:
        change: the intervention or operation, such as "Add at attn_out".
        what: the part of the model.
        done: how many layers the form touches; 0 where it is refused.
        total: how many the model has.
        layers: the layers asked for.
        expressible: whether the form can say it at all.
        refused: why it is refused; None where it is not.
        remedy: what to do instead.
        note: what else the reader should know.
    """

    change: str
    what: str
    done: int
    total: int
    layers: tuple[int, ...]
    expressible: bool = True
    refused: str | None = None
    remedy: str | None = None
    note: str = ""

    def __str__(self) -> str:
        counted = f"{self.change}: {self.what} {self.done}/{self.total} layers"
        counted = f"{counted}, {self.note}" if self.note else counted
        return counted if self.refused is None else f"{counted}: refused, {self.refused}. {self.remedy}."


@dataclass(frozen=True)
class Coverage:
    """What a form touches.

    Attributes:
        form: `hook`, `vllm`, `patch` or `lora`.
        rows: one per part, in the order of the change.
    """

    form: Form
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every part is expressed."""
        return all(row.refused is None for row in self.rows)

    def require(self) -> None:
        """Raise SteerError with the first refusal, and how many more there are."""
        refused = [row for row in self.rows if row.refused is not None]
        if refused:
            first, more = refused[0], f" ({len(refused) - 1} more parts are refused)" if len(refused) > 1 else ""
            raise SteerError(
                f"{first.change} has no {self.form} form here: {first.refused}{more}", "", first.remedy or ""
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {"form": self.form, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def frame(self) -> pandas.DataFrame:
        """Return one row per part: the form, then every field of the row.

        Raises:
            SteerError: pandas is not installed.
        """
        rows = [{"form": self.form} | asdict(row) for row in self.rows]
        return table(rows, ["form", *(field.name for field in fields(Row))])

    def __str__(self) -> str:
        good = sum(row.refused is None for row in self.rows)
        return "\n".join([f"{self.form} form, {good} of {len(self.rows)} parts", *(f"  {row}" for row in self.rows)])

    def _repr_html_(self) -> str:
        names = ("change", "part", "layers", "")
        head = "".join(f"<th>{name}</th>" for name in names)
        body = "".join(_html_row(row) for row in self.rows)
        return f"<p>{self.form} form: {'everything' if self.ok else 'not everything'}</p><table><tr>{head}</tr>{body}</table>"


def coverage(change: Steering | Patch, model_or_path: SteerableModel | str | Path, form: Form = "hook") -> Coverage:
    """Say what `form` will touch of a model, and what it refuses.

    Args:
        change: a steering or a patch.
        model_or_path: a loaded model, or a checkpoint folder, of which only headers (and, for adapters, output
            biases) are read.
        form: `hook`, `vllm`, `patch` or `lora`.

    Raises:
        SteerError: an unknown form, no checkpoint, another model's shape, a layer or head out of range.
    """
    if form not in get_args(Form):
        raise SteerError(f"there is no form {form!r}", f"one of {', '.join(get_args(Form))}")
    target = target_of(model_or_path)
    rows = _of_patch(change, target, form) if isinstance(change, Patch) else _of_steering(change, target, form)
    return Coverage(form, tuple(rows))


def _of_steering(steering: Steering, target: Target, form: Form) -> list[Row]:
    steering.check(target.anatomy, target.identity)
    together = form_table.vllm_together(steering) if form == "vllm" else None
    rows = []
    for intervention in steering.interventions:
        change = f"{type(intervention).__name__} at {intervention.site}"
        for verdict in _verdicts(intervention, target, form):
            if form == "lora" and verdict.reason is None:
                verdict = replace(verdict, note=_rank_note(_projected(steering, intervention.site), verdict.layers))
            if together is not None and verdict.reason is None:
                verdict = replace(verdict, reason=together[0], remedy=together[1])
            factors = [intervention.beta] if isinstance(intervention, ScaleExperts) else None
            if form == "patch" and verdict.reason is None and (refusal := _quantised(target, factors)):
                verdict = replace(verdict, reason=refusal[0], remedy=refusal[1])
            rows.append(_row(change, verdict, target))
    return rows


def _quantised(target: Target, factors: Sequence[float] | None) -> Refusal | None:
    """Why quantised weights cannot be patched; `factors` where all that is done is to multiply experts by them."""
    if not target.quantised:
        return None
    if factors is not None and target.quantised == METHOD:
        return exponents.refusal(factors)
    return f"the weights are quantised ({target.quantised})", "Patch the unquantised model, or use the hook form"


def _factors(matrix: Matrix, operations: Sequence[Operation]) -> list[float] | None:
    """What an expert's matrix or bias is multiplied by, if nothing else is done to it; a bias is never packed."""
    scales = [each for each in operations if isinstance(each, Scale)]
    if matrix.module not in EXPERTS or len(scales) < len(operations):
        return None
    return [] if matrix.bias else [each.effective for each in scales]


def _verdicts(intervention: Intervention, target: Target, form: Form) -> list[Verdict]:
    if form == "lora":
        return form_table.lora(intervention, target.anatomy, target.bias)
    return {"hook": form_table.hook, "vllm": form_table.vllm, "patch": form_table.patch}[form](
        intervention, target.anatomy
    )


def _of_patch(patch: Patch, target: Target, form: Form) -> list[Row]:
    check_same(patch.model, target.identity, "the patch")
    grouped: dict[tuple[str, Refusal | None], dict[Matrix, tuple[Operation, ...]]] = {}
    for matrix, operations in patch.matrices.items():
        _check(matrix, operations, target)
        refusal = _unwritable(matrix, operations, target) if form in ("patch", "vllm") else None
        if form == "patch" and refusal is None:
            refusal = _quantised(target, _factors(matrix, operations))
        grouped.setdefault((_what(matrix), refusal), {})[matrix] = operations
    rows = []
    for (what, refusal), touched in grouped.items():
        verdict = _patched(what, touched, _layers(touched, target), form, target)
        if refusal is not None:
            verdict = replace(verdict, reason=refusal[0], remedy=refusal[1])
        rows.append(_row("patch", verdict, target))
    return rows


def _unwritable(matrix: Matrix, operations: tuple[Operation, ...], target: Target) -> Refusal | None:
    """Why no checkpoint of this family can hold what is done to a matrix, and what to do instead."""
    anatomy, acting = target.anatomy, [operation for operation in operations if operation.weight]
    if anatomy.tied and matrix.module in OUTSIDE and not all(isinstance(each, AddDense) for each in acting):
        reason = "the embedding is tied to the vocabulary head, and the edit would change both"
        return reason, "Untie the head (`steer apply --untie`), or use the hook form"
    if not acting or not matrix.bias or has_bias(anatomy, matrix):
        return None
    found = f"{anatomy.family} models load no bias there"
    if matrix.module in PER_LAYER:
        found = bias_form(anatomy, matrix.module, matrix.layer)[1] or ""
    return (found, form_table.HOOK) if found else None


def _what(matrix: Matrix) -> str:
    if matrix.raw:
        return "tensors by name"
    return matrix.module.replace("_", " ") + (" bias" if matrix.bias else "")


def _check(matrix: Matrix, operations: tuple[Operation, ...], target: Target) -> None:
    """Refuse operations that do not fit the matrix, as far as the anatomy counts it."""
    if not matrix.raw:
        target.anatomy.in_memory(matrix)
    for operation in operations:
        check_heads(target.anatomy, matrix, operation.heads)
    if matrix.module not in ("attention_output", "mlp_output"):
        return
    out, into = target.anatomy.shape(matrix.module, matrix.layer)
    for operation in operations:
        operation.check((out, 1 if matrix.bias else into), target.anatomy.heads)


def _layers(touched: Iterable[Matrix], target: Target) -> tuple[int, ...]:
    """Layers of matrices, of tensors by name too; what lies outside of the layers counts as the one thing that it is."""
    begin = target.anatomy.record.model.layers + "."
    found = set()
    for matrix in touched:
        if matrix.raw:
            path = target.anatomy.in_memory(matrix).name
            found |= {int(path.removeprefix(begin).split(".", 1)[0])} if path.startswith(begin) else set()
        else:
            found.add(max(matrix.layer, 0))
    return tuple(sorted(found))


def _patched(
    what: str, touched: dict[Matrix, tuple[Operation, ...]], layers: tuple[int, ...], form: Form, target: Target
) -> Verdict:
    operations = [operation for found in touched.values() for operation in found]
    heads = {(operation.matrix, head) for operation in operations for head in operation.heads or ()}
    counted = form_table.counted(len(heads), "head") if heads else f"{len(touched)} matrices"
    if form == "patch":
        return Verdict(what, layers, note="; ".join(filter(None, [counted, noted(touched)])))
    if form == "vllm":
        adapter = _adapted(what, layers, operations, target).reason is None
        return Verdict(what, layers, note=form_table.SERVED if adapter else "as the patched checkpoint")
    if form == "hook":
        by_heads = all(isinstance(each, ProjectColumns) and each.heads for each in operations)
        if by_heads:
            return Verdict(what, layers, note=counted)
        return Verdict(
            what, layers, "only projections of heads go back into a hook", "Use `patch.on(model)`", note=counted
        )
    return _adapted(what, layers, operations, target)


def _adapted(what: str, layers: tuple[int, ...], operations: list[Operation], target: Target) -> Verdict:
    """What an adapter can say of operations on matrices of one kind."""
    vectors: dict[int, list[Tensor]] = {}
    more: dict[Matrix, int] = {}
    for operation in operations:
        if operation.matrix.bias:
            held = target.bias(replace(operation.matrix, bias=False))
            nothing = held is None or (
                isinstance(operation, ProjectColumns) and not form_table.along(held, operation.vector)
            )
            if isinstance(operation, AddBias) or not nothing:
                return Verdict(what, layers, "an adapter holds no bias", "Use the patch itself")
        elif isinstance(operation, ProjectColumns):
            vectors.setdefault(operation.layer, []).append(operation.vector)
        elif isinstance(operation, AddLowRank):
            more[operation.matrix] = more.get(operation.matrix, 0) + operation.A.shape[0]
        elif isinstance(operation, AddDense):
            return Verdict(
                what,
                layers,
                "a dense difference has no exact factors",
                "Take the best of a rank: `steer export --rank R`",
            )
        else:
            name = str(operation.as_json()["operation"])
            return Verdict(
                what, layers, f"{name} is no change of low rank, and an adapter holds no bias", "Use the patch itself"
            )
    ranks = [_rank(found) for found in vectors.values()]
    return Verdict(what, layers, note=f"rank {max(ranks, default=0) + max(more.values(), default=0)}")


def _row(change: str, verdict: Verdict, target: Target) -> Row:
    return Row(
        change,
        verdict.what,
        done=len(verdict.layers) if verdict.reason is None else 0,
        total=_total(verdict.what, target),
        layers=verdict.layers,
        expressible=verdict.reason is None,
        refused=verdict.reason,
        remedy=verdict.remedy,
        note=verdict.note,
    )


def _total(what: str, target: Target) -> int:
    return 1 if what in OUTSIDE else target.anatomy.layers


def _projected(steering: Steering, site: str) -> dict[int, list[Tensor]]:
    """Every vector, by layer, that the steering projects out of the matrix behind `site`."""
    same = next(
        (sites for sites in (("head_out", "attn_raw", "attn_out"), ("mlp_raw", "mlp_out")) if site in sites), (site,)
    )
    found: dict[int, list[Tensor]] = {}
    for intervention in steering.interventions:
        if isinstance(intervention, ProjectOut) and intervention.site in same:
            for layer in intervention.active_layers:
                found.setdefault(layer, []).append(intervention.direction[layer])
    return found


def _rank_note(vectors: dict[int, list[Tensor]], layers: tuple[int, ...]) -> str:
    """The largest rank that an adapter needs: in each layer the dimension that its vectors span, up to float32."""
    return f"rank {max(_rank(vectors[layer]) for layer in layers)}"


def _rank(vectors: list[Tensor]) -> int:
    return int(torch.linalg.matrix_rank(unit_vector(torch.stack(vectors)), rtol=ROUNDING))


def _html_row(row: Row) -> str:
    last = row.note if row.refused is None else f"refused: {row.refused}. {row.remedy}."
    cells = (row.change, row.what, f"{row.done}/{row.total}", last)
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
