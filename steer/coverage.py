"""Coverage: before anything runs, what a form will touch of a model, counted against what exists.

    >>> print(coverage(steering, "models/qwen3", form="hook"))          # doctest: +SKIP
    hook form, 2 of 2 parts
      Add at attn_out: attention output 28/28 layers
      ProjectOut at head_out: attention output 3/28 layers, 4 heads

A part is refused either because the form cannot express it (`expressible` is false; the table of DESIGN §4 in
`steer.form_table`) or because this version does not have the code for it yet. Both say what to do instead.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from steer import form_table
from steer.directions import unit_vector
from steer.errors import SteerError
from steer.form_table import Form, Verdict
from steer.identity import check_same
from steer.interventions import Intervention, ProjectOut
from steer.patches import Patch
from steer.steering import Steering
from steer.tables import table
from steer.targets import Target, target_of

if TYPE_CHECKING:
    import pandas

    from steer.model import SteerableModel

ROUNDING = 1e-6
LATER = {
    "vllm": (
        "vLLM can express this, but its back end is not in this version",
        "Use the hook form, or serve the patched checkpoint",
    ),
    "patch": ("a patch can express this, but this version edits attention outputs per head only", "Use the hook form"),
    "lora": (
        "an adapter can express this, but the export of adapters is not in this version",
        "Use the patch or the hook form",
    ),
}


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
    rows = []
    for intervention in steering.interventions:
        change = f"{type(intervention).__name__} at {intervention.site}"
        for verdict in _verdicts(intervention, target, form):
            if form == "lora" and verdict.reason is None:
                verdict = replace(verdict, note=_rank_note(_projected(steering, intervention.site), verdict.layers))
            rows.append(_row(change, verdict, target, form, intervention.site))
    return rows


def _verdicts(intervention: Intervention, target: Target, form: Form) -> list[Verdict]:
    if form == "lora":
        return form_table.lora(intervention, target.anatomy, target.bias)
    return {"hook": form_table.hook, "vllm": form_table.vllm, "patch": form_table.patch}[form](
        intervention, target.anatomy
    )


def _of_patch(patch: Patch, target: Target, form: Form) -> list[Row]:
    check_same(patch.model, target.identity, "the patch")
    rows = []
    for module in dict.fromkeys(matrix.module for matrix in patch.matrices):
        touched = {matrix: operations for matrix, operations in patch.matrices.items() if matrix.module == module}
        vectors: dict[int, list[Tensor]] = {}
        for matrix, operations in touched.items():
            shape = target.anatomy.shape(module, matrix.layer)
            for operation in operations:
                operation.check((shape[0], shape[1]), target.anatomy.heads)
                vectors.setdefault(matrix.layer, []).append(operation.tensors["vector"])
        heads = len(
            {
                (matrix, head)
                for matrix, operations in touched.items()
                for operation in operations
                for head in operation.heads or ()
            }
        )
        layers = tuple(matrix.layer for matrix in touched)
        note = {"lora": _rank_note(vectors, layers), "vllm": form_table.SERVED}.get(
            form, form_table.counted(heads, "head")
        )
        rows.append(_row("patch", Verdict(module.replace("_", " "), layers, note=note), target, form, "head_out"))
    return rows


def _row(change: str, verdict: Verdict, target: Target, form: Form, site: str) -> Row:
    reason, remedy = verdict.reason, verdict.remedy
    if reason is None and form == "patch" and target.quantised:
        reason, remedy = (
            f"the weights are quantised ({target.quantised})",
            "Patch the unquantised model, or use the hook form",
        )
        verdict = replace(verdict, reason=reason)
    elif reason is None and (form in ("vllm", "lora") or (form == "patch" and site != "head_out")):
        reason, remedy = LATER[form]
    return Row(
        change,
        verdict.what,
        done=len(verdict.layers) if reason is None else 0,
        total=_total(verdict.what, target),
        layers=verdict.layers,
        expressible=verdict.reason is None,
        refused=reason,
        remedy=remedy,
        note=verdict.note,
    )


def _total(what: str, target: Target) -> int:
    return 1 if what == "embedding" else target.anatomy.layers


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
    ranks = {int(torch.linalg.matrix_rank(unit_vector(torch.stack(vectors[layer])), rtol=ROUNDING)) for layer in layers}
    return f"rank {max(ranks)}"


def _html_row(row: Row) -> str:
    last = row.note if row.refused is None else f"refused: {row.refused}. {row.remedy}."
    cells = (row.change, row.what, f"{row.done}/{row.total}", last)
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
