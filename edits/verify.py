"""Whether two subjects are the same model: bytes first, then logits against what fp32 itself loses.

Two forms of one change need not agree to the last bit once activations are rounded in another order. How much may
they differ? The *floor* is max |logits in fp32 - logits in fp64| of the second subject on the same prompts, its own
rounding; the forms agree if their logits differ by at most three times that. Both sides run as fp32 copies whose
parameters were cloned, since a parameter that maps a file at an odd address gives other last bits. A checkpoint in
bf16 stores a rounded change while a hook keeps the exact one; what this rounding alone does to the logits is
measured too (`cast`), through the weights and not through the hook, and is granted in addition.
"""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from edits.checkpoint.compare import OnDisk, same_bytes
from steer.errors import SteerError
from steer.logits import agreement
from steer.model import SteerableModel, load, wrap
from steer.patches import Patch
from steer.prompts import Content
from steer.steering import Steering
from steer.tables import table

if TYPE_CHECKING:
    import pandas

LARGEST_COPY = 500_000_000
FACTOR = 3.0
STATED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Subject = SteerableModel | OnDisk | str | os.PathLike[str]


@dataclass(frozen=True)
class Prompt:
    """Token ids that are run, and how many of them are the prompt."""

    tokens: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Agreement:
    """How two subjects agree.

    Attributes:
        first, second: their names.
        passed: no tensor differs, and the logits differ by at most `tolerance` where they were compared.
        bytes_equal: whether every tensor on disk is equal after the patches; None where a side has no tensors on disk
            or a change without a patch form.
        tensors: how many tensors were compared.
        patched: how many of them a patch touches.
        differing: names of tensors that differ.
        max_abs_logit_difference: over all prompts and positions; None where no model was run.
        kl: mean KL(first || second) in nats per position.
        top1_agreement: share of positions where both put the same token first.
        positions: how many were compared.
        floor: max |logits in fp32 - in fp64| of the second subject; None for a model too large for a copy.
        cast: max |effect on the logits| of rounding the change to the checkpoint's dtype, where a hook is compared.
        tolerance: what the logit difference was held against.
    """

    first: str
    second: str
    passed: bool
    bytes_equal: bool | None = None
    tensors: int = 0
    patched: int = 0
    differing: tuple[str, ...] = ()
    max_abs_logit_difference: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    positions: int = 0
    floor: float | None = None
    cast: float | None = None
    tolerance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self) | {"differing": list(self.differing)}

    def rows(self) -> list[tuple[str, str]]:
        """What was measured, as label and text."""
        rows = [("first", self.first), ("second", self.second)]
        words = {None: "not comparable", True: "equal", False: "differ: " + ", ".join(self.differing[:3])}
        more = f" and {len(self.differing) - 3} more" if len(self.differing) > 3 else ""
        rows.append(("bytes", f"{words[self.bytes_equal]}{more} ({self.tensors} tensors, {self.patched} patched)"))
        if self.max_abs_logit_difference is not None:
            rows += [
                ("max |logit difference|", f"{self.max_abs_logit_difference:.3g}"),
                ("tolerance", f"{self.tolerance:.3g}"),
                ("floor (fp32 against fp64)", "too large a model" if self.floor is None else f"{self.floor:.3g}"),
                ("KL", f"{self.kl:.3g} nats"),
                ("same top token", f"{self.top1_agreement:.1%} of {self.positions} positions"),
            ]
        if self.cast is not None:
            rows.append(("effect of the cast", f"{self.cast:.3g}"))
        return [*rows, ("verdict", "agree" if self.passed else "DISAGREE")]

    def frame(self) -> pandas.DataFrame:
        """Return one row per measure: first, second, measure, value; `differing` is a count, None was not measured.

        Raises:
            SteerError: pandas is not installed.
        """
        values = asdict(self) | {"differing": len(self.differing)}
        sides = {name: values.pop(name) for name in ("first", "second")}
        return table(
            [sides | {"measure": name, "value": value} for name, value in values.items()], [*sides, "measure", "value"]
        )

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label.ljust(width)}  {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>" for label, text in self.rows())
        return f"<table>{''.join(cells)}</table>"


def verify(
    first: Subject,
    second: Subject,
    prompts: Sequence[Content] | None = None,
    *,
    weights_only: bool = False,
    tolerance: float | None = None,
) -> Agreement:
    """Measure whether two subjects are the same model.

    Args:
        first: a model, a view of one (`m.with_(patch)`), the folder of a checkpoint, or one with patches (`OnDisk`).
        second: likewise; its rounding is the floor.
        prompts: texts or chat messages to compare on, beside fixed sequences of token ids with the model's marks in
            them, which reach every phase.
        weights_only: compare tensors on disk and load nothing that is not loaded.
        tolerance: largest logit difference that passes; by default 3 x (floor + cast), and for models above
            `LARGEST_COPY` parameters, which run in their own dtype, `STATED` times the largest logit.

    Raises:
        SteerError: no checkpoint in a folder; `weights_only` for something that is not on disk; another vocabulary.
    """
    names = (_name(first), _name(second))
    sides = (_on_disk(first), _on_disk(second))
    found: dict[str, Any] = {"bytes_equal": None}
    if sides[0] is not None and sides[1] is not None:
        same = same_bytes(sides[0], sides[1])
        found = {
            "bytes_equal": same.equal,
            "tensors": same.tensors,
            "patched": same.patched,
            "differing": same.differing,
        }
    elif weights_only:
        which = names[0] if sides[0] is None else names[1]
        raise SteerError(
            f"{which} has no tensors on disk that could be compared",
            "checkpoints, patches, and steerings with a patch form",
            "Leave --weights out, to compare logits",
        )
    if weights_only:
        return Agreement(names[0], names[1], bool(found["bytes_equal"]), **found)
    measured = _compare_logits(_opened(first), _opened(second), prompts, tolerance)
    close = measured["max_abs_logit_difference"] <= measured["tolerance"]
    return Agreement(names[0], names[1], close and found["bytes_equal"] is not False, **found, **measured)


def _name(subject: Subject) -> str:
    if isinstance(subject, SteerableModel):
        base, changes = subject.name, subject.changes
    elif isinstance(subject, OnDisk):
        base, changes = str(subject.folder), subject.patches
    else:
        base, changes = str(Path(subject)), ()
    words = [
        f"{type(change).__name__.lower()} {change.fingerprint[:8]}" + (f" x {c}" if c != 1 else "")
        for change, c in changes
    ]
    return " + ".join([base, *words])


def _opened(subject: Subject) -> SteerableModel:
    if isinstance(subject, SteerableModel):
        return subject
    if not isinstance(subject, OnDisk):
        return load(Path(subject))
    model = load(subject.folder, anatomy=subject.anatomy)
    for patch, scale in subject.patches:
        model = model.with_(patch, coefficient=scale)
    return model


def _on_disk(subject: Subject) -> OnDisk | None:
    """The subject as tensors on disk under patches; None where it has no such form."""
    if isinstance(subject, OnDisk):
        return subject
    if not isinstance(subject, SteerableModel):
        return OnDisk(Path(subject))
    if subject.path is None:
        return None
    patches = []
    for change, scale in subject.changes:
        try:
            patches.append((change if isinstance(change, Patch) else Patch.from_steering(change), scale))
        except SteerError:
            return None
    return OnDisk(subject.path, tuple(patches), subject.anatomy.record)


def _compare_logits(
    first: SteerableModel, second: SteerableModel, prompts: Sequence[Content] | None, tolerance: float | None
) -> dict[str, Any]:
    if first.anatomy.vocab != second.anatomy.vocab:
        raise SteerError(
            f"the vocabularies have {first.anatomy.vocab} and {second.anatomy.vocab} entries",
            "two models of one vocabulary",
            "Compare each with its own base",
        )
    chosen = fixed_prompts(first) + _rendered(first, prompts or ())
    small = max(sum(p.numel() for p in model.hf.parameters()) for model in (first, second)) <= LARGEST_COPY
    precision = torch.float32 if small else None
    a, b = _logits(first, chosen, precision), _logits(second, chosen, precision)
    floor = cast = None
    if small:
        floor = _gap(b, _logits(second, chosen, torch.float64))
        cast = max(filter(None, (_cast(first, second, chosen), _cast(second, first, chosen))), default=None)
    if tolerance is None:
        own = STATED[min((first.dtype, second.dtype), key=lambda dtype: dtype.itemsize)] * float(b.abs().max())
        tolerance = own if floor is None else FACTOR * (floor + (cast or 0.0))
    result = agreement(a, b)
    return {
        "max_abs_logit_difference": result.max_difference,
        "kl": result.mean_kl,
        "top1_agreement": result.top_1,
        "positions": result.places,
        "floor": floor,
        "cast": cast,
        "tolerance": tolerance,
    }


def fixed_prompts(model: SteerableModel) -> list[Prompt]:
    """Return the built-in prompts: seeded random tokens, with the first opening and closing mark where there are marks."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in torch.randint(model.anatomy.vocab, (count,), generator=generator)]

    opening, closing = (list(marks[0]) if marks else [] for marks in (model.marks.opening, model.marks.closing))
    found = []
    for count in (1, 6, 12, 20):
        prompt = tokens(count)
        found.append(Prompt((*prompt, *tokens(2), *opening, *tokens(count), *closing, *tokens(4)), count))
    return found


def _rendered(model: SteerableModel, contents: Sequence[Content]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for content in contents:
        prompt = [int(token) for token in model.render(content).token_ids]
        reply = torch.randint(model.anatomy.vocab, (8,), generator=generator).tolist()
        found.append(Prompt((*prompt, *reply), len(prompt)))
    return found


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _logits(
    model: SteerableModel, prompts: Sequence[Prompt], dtype: torch.dtype | None
) -> Float[Tensor, "position vocab"]:
    """Run a subject; with a dtype, as a copy of its weights in that dtype, taken under its patches."""
    running = model if dtype is None else _copied(model, dtype)
    lengths = [prompt.length for prompt in prompts]
    return torch.cat([values.cpu() for values in running.run([prompt.tokens for prompt in prompts], lengths)])


def _copied(model: SteerableModel, dtype: torch.dtype) -> SteerableModel:
    with ExitStack() as stack:
        for change, scale in model.changes:
            if isinstance(change, Patch):
                stack.enter_context(change.on(model, scale))
        hf = copy.deepcopy(model.hf).to(dtype)
    hf.set_experts_implementation("eager")  # The default kernel for experts has no float64.
    again = wrap(
        hf, model.tokenizer, name=model.name, anatomy=model.anatomy.record, marks=model.marks, self_check=False
    )
    for change, scale in model.changes:
        if isinstance(change, Steering):
            again = again.with_(change, coefficient=scale)
    return again


def _cast(hook: SteerableModel, other: SteerableModel, prompts: Sequence[Prompt]) -> float | None:
    """Return what rounding a hook's change to the dtype of its own model's weights does to the logits.

    None where the model is fp32 or wider, the other side is a hook too, or the change has no patch form.
    """
    hooked = [any(isinstance(change, Steering) for change, _ in model.changes) for model in (hook, other)]
    disk = _on_disk(hook)
    if hook.dtype.itemsize >= torch.float32.itemsize or hooked != [True, False] or disk is None:
        return None
    plain = wrap(
        hook.hf, hook.tokenizer, name=hook.name, anatomy=hook.anatomy.record, marks=hook.marks, self_check=False
    )
    stored, exact = plain, _copied(plain, torch.float32)
    for patch, scale in disk.patches:
        stored, exact = stored.with_(patch, coefficient=scale), exact.with_(patch, coefficient=scale)
    return _gap(_logits(stored, prompts, torch.float32), _logits(exact, prompts, None))
